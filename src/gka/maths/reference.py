"""Gated KalmaNet on one page: the whole map, token by token, in the order the paper defines it.

Slow and plain on purpose: every faster form is tested against it. It is differentiable by autograd, and
computes in float64 if its inputs are. Equation numbers: arXiv 2511.21016v1.
"""

from typing import Literal

import torch
from torch import Tensor

from gka.maths.readout import mix
from gka.maths.ridge import split_empty
from gka.maths.solvers.chebyshev import chebyshev_solve
from gka.maths.solvers.exact import exact_solve

State = tuple[Tensor, Tensor]
ReferenceSolver = Literal["chebyshev", "exact"]


def solve_ridge(
    h: Tensor, q: Tensor, ridge_ratio: float, num_iter: int, solver: ReferenceSolver = "chebyshev"
) -> Tensor:
    """x of (H + lambda I) x = q with lambda = a |H|_F; H [..., K, K], q [..., K]. x = 0 where H = 0."""
    fro, empty = split_empty(h.square().sum((-2, -1)))
    q = q.masked_fill(empty.unsqueeze(-1), 0.0)
    if solver == "exact":
        return exact_solve(h, q, ridge_ratio * fro)
    return chebyshev_solve(
        lambda d: (h @ d.unsqueeze(-1)).squeeze(-1), q, fro, ridge_ratio, num_iter
    )


def reference_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """A batch of equally long sequences; k and v already have as many heads as q.

    Args:
        q, k: [B,T,H,K]. v: [B,T,H,V]. g, gk, alpha, beta: [B,T,H] or None.
        state: (H_0 [B,H,K,K], U_0 [B,H,K,V]).
        scale: factor of the readout.
        ridge_ratio: a in lambda_t = a F_t.
        num_iter: Chebyshev steps r; 0: no ridge (x_t = q_t), with `solver="exact"` too, which otherwise
            ignores it.

    Returns:
        o [B,T,H,V] and the state after the last token.
    """
    h, u = state
    if beta is not None:  # the write gate scales key and value
        k, v = beta.unsqueeze(-1) * k, beta.unsqueeze(-1) * v
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = q[:, t], k[:, t], v[:, t]
        if gk is not None:
            h = gk[:, t].exp()[..., None, None] * h
        if g is not None:
            u = g[:, t].exp()[..., None, None] * u
        h = h + k_t.unsqueeze(-1) * k_t.unsqueeze(-2)  # H_t = gamma_t H_{t-1} + k_t k_t^T
        u = u + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)  # U_t = gamma_t U_{t-1} + k_t v_t^T
        x_t = solve_ridge(h, q_t, ridge_ratio, num_iter, solver) if num_iter > 0 else q_t
        z_t = mix(q_t, x_t, None if alpha is None else alpha[:, t])  # the alpha-connection
        outputs.append(scale * (z_t.unsqueeze(-2) @ u).squeeze(-2))  # o_t = scale U_t^T z_t
    o = torch.stack(outputs, 1) if outputs else scale * v  # T = 0: v is as empty as o
    return o, (h, u)
