"""Normalisations over the last dimension, computed in float32 or better."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs: what sums, gates and norms are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (|x|_2 + eps) over the last dimension, in the dtype of x."""
    wide = x.to(working_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / (norm + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps).

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def normalize(self, x: Tensor) -> Tensor:
        """The result in the working dtype."""
        dtype = working_dtype(x)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of x."""
        return self.normalize(x).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * SiLU(gate), the norm first."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[..., dim], [..., dim] -> [..., dim], in the dtype of x."""
        return (self.normalize(x) * F.silu(gate.to(working_dtype(x)))).to(x.dtype)
