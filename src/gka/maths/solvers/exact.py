"""The exact solve of (H_t + lambda_t I) x_t = q_t by Cholesky: the oracle of every other solver."""

import torch
from torch import Tensor


def exact_solve(h: Tensor, q: Tensor, lamb: Tensor) -> Tensor:
    """x = (H + lambda I)^-1 q, differentiable, in float64 if the inputs are.

    Args:
        h: symmetric positive semi-definite [..., K, K].
        q: right-hand sides [..., K].
        lamb: lambda > 0, [...].

    Returns:
        x [..., K].
    """
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    factor = torch.linalg.cholesky(h + lamb[..., None, None] * eye)
    return torch.cholesky_solve(q.unsqueeze(-1), factor).squeeze(-1)
