"""Solving in d of K dimensions, through a map S [K,d] and its transpose (arXiv 2511.21016, appendix H).

    x_t = S x'_t,  (H'_t + lambda'_t I) x'_t = q'_t,
    H'_t = S^T H_t S,  lambda'_t = a |H'_t|_F,  q'_t = S^T q_t.

H'_t is the moment of the keys k' = S^T k, and U_t^T x_t = U'_t^T x'_t with U'_t = S^T U_t, the moment of k'
and v: the solve is the plain one on projected queries and keys. docs/maths.md, section 12, has what it means
that the columns of S are orthonormal.
"""

import torch
from torch import Tensor

from gka.maths.readout import mix
from gka.maths.reference import ReferenceSolver, State, solve_ridge


def project(x: Tensor, basis: Tensor) -> Tensor:
    """S^T x of every head: x [B,T,H,K], basis [G,K,d] -> [B,T,H,d]; H / G consecutive heads share a basis."""
    grouped = x.unflatten(2, (basis.shape[0], -1))
    return torch.einsum("btghk,gkd->btghd", grouped, basis).flatten(2, 3)


def orthonormal(weight: Tensor) -> Tensor:
    """The map of orthonormal columns with the span of `weight` [...,K,d], W L^-T with L L^T = W^T W.

    float32 or better inside; in the dtype of `weight`. The sketched map depends on the span alone, so this
    loses nothing, and gradients of `weight` lie across its span. NaN where the columns are not independent.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Nothing waits for the device: a failure is seen as NaN.
    lower, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    lower = torch.where(failed[..., None, None] == 0, lower, torch.nan)
    return torch.linalg.solve_triangular(lower.mT, wide, upper=True, left=False).to(weight.dtype)


def spectral_basis(h: Tensor, dim: int) -> Tensor:
    """The `dim` leading eigenvectors of symmetric h [...,K,K], as columns [...,K,dim].

    No other basis keeps more of the trace of S^T H S, the share of the keys' energy that the solve sees.
    """
    return torch.linalg.eigh(h).eigenvectors[..., -dim:].flip(-1)


def sketched_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    basis: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: State,
    *,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    solver: ReferenceSolver = "chebyshev",
) -> tuple[Tensor, State]:
    """The definition, token by token, from whole moments; every faster form is tested against it.

    Args:
        q, k: [B,T,H,K]. v: [B,T,H,V]. basis: S [H,K,d]. g, gk, alpha, beta: [B,T,H] or None.
        state: (H_0 [B,H,K,K], U_0 [B,H,K,V]), of the keys before projection.
        scale, ridge_ratio, num_iter, solver: as in `reference_sequence`.

    Returns:
        o [B,T,H,V] and the state after the last token, H and U.
    """
    h, u = state
    if beta is not None:
        k, v = beta.unsqueeze(-1) * k, beta.unsqueeze(-1) * v
    outputs = []
    for t in range(q.shape[1]):
        if gk is not None:
            h = gk[:, t].exp()[..., None, None] * h
        if g is not None:
            u = g[:, t].exp()[..., None, None] * u
        h = h + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        u = u + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        inside = (basis.mT @ q[:, t].unsqueeze(-1)).squeeze(-1)  # S^T q
        if num_iter > 0:
            inside = solve_ridge(basis.mT @ h @ basis, inside, ridge_ratio, num_iter, solver)
        x_t = (basis @ inside.unsqueeze(-1)).squeeze(-1)  # nothing outside S's span
        z_t = mix(q[:, t], x_t, None if alpha is None else alpha[:, t])
        outputs.append(scale * (z_t.unsqueeze(-2) @ u).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else scale * v, (h, u)
