"""A plain Gated KalmaNet op of any iteration, differentiated through its steps or implicitly.

Chunk by chunk in ordinary torch, with every quantity differentiable by autograd. It exists to compare ways of
differentiating; `gka.ops.chunk_gka` is the op to use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from gka.maths.solvers.chebyshev import chebyshev_solve
from gka.ops import chunk_simple_gla

CHUNK = 64
Solve = Callable[["PlainSystem", Tensor], Tensor]


@dataclass(frozen=True)
class PlainSystem:
    """The products of H_t for all tokens.

    Attributes:
        k: keys [B,H,N,C,K]. h: chunk-start states [B,H,N,K,K].
        zeta: decay from the chunk's start [B,H,N,C,1]. mask: M [B,H,N,C,C], row t, column j.
        fro: F_t [B,H,N,C].
        ridge_ratio, constant: a and c of lambda_t = a F_t + c.
        operands: dtype to which a product's operands are rounded.
    """

    k: Tensor
    h: Tensor
    zeta: Tensor
    mask: Tensor
    fro: Tensor
    ridge_ratio: float
    operands: torch.dtype
    constant: float = 0.0

    @property
    def lamb(self) -> Tensor:
        """lambda_t [B,H,N,C]."""
        return self.ridge_ratio * self.fro + self.constant

    def product(self, d: Tensor) -> Tensor:
        """H_t d_t of rows d [B,H,N,C,K]."""
        k, h, d = (x.to(self.operands).to(x.dtype) for x in (self.k, self.h, d))
        return self.zeta * (d @ h) + ((d @ k.mT) * self.mask) @ k

    def apply(self, d: Tensor) -> Tensor:
        """(H_t + lambda_t I) d_t."""
        return self.product(d) + self.lamb.unsqueeze(-1) * d


def plain_system(
    k: Tensor, g: Tensor, ridge_ratio: float, operands: torch.dtype, constant: float = 0.0
) -> PlainSystem:
    """The systems of keys k [B,H,N,C,K] and log decays g [B,H,N,C]."""
    total = g.cumsum(-1)
    future = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1)
    mask = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    zeta = total.exp().unsqueeze(-1)
    state, starts = k.new_zeros(*k.shape[:2], k.shape[-1], k.shape[-1]), []
    for n in range(k.shape[2]):
        starts.append(state)
        kept = mask[:, :, n, -1].unsqueeze(-1) * k[:, :, n]
        state = zeta[:, :, n, -1:] * state + kept.mT @ k[:, :, n]
    h = torch.stack(starts, 2)
    pairs = mask @ (k @ k.mT).square()
    squared = zeta[..., 0].square() * h.square().sum((-2, -1)).unsqueeze(-1)
    squared = squared + 2.0 * zeta[..., 0] * (mask @ ((k @ h) * k).sum(-1, keepdim=True))[..., 0]
    squared = squared + (pairs * mask).sum(-1)
    return PlainSystem(k, h, zeta, mask, squared.sqrt(), ridge_ratio, operands, constant)


def chebyshev_steps(system: PlainSystem, q: Tensor) -> Tensor:
    """30 Chebyshev steps, differentiable."""
    return chebyshev_solve(system.product, q, system.fro, system.ridge_ratio, 30)


def chebyshev_on(system: PlainSystem, q: Tensor, num_iter: int) -> Tensor:
    """Chebyshev steps on [lambda_t, lambda_t + F_t] of any lambda_t: weights that differ by token.

    With lambda_t = a F_t they are those of `gka.maths.solvers.chebyshev`.
    """
    fro, lamb = system.fro.unsqueeze(-1), system.lamb.unsqueeze(-1)
    step = 2.0 / (2.0 * lamb + fro)  # 2/(L + mu)
    rho_squared, omega = (fro / (2.0 * lamb + fro)).square(), 2.0
    residual, d = q, step * q
    x = d
    for _ in range(num_iter):
        omega = 4.0 / (4.0 - rho_squared * omega)
        residual = residual - system.apply(d)
        d = (omega - 1.0) * d + (omega * step) * residual
        x = x + d
    return x


def conjugate_gradient_steps(system: PlainSystem, q: Tensor, guard: float = 0.0) -> Tensor:
    """30 steps of conjugate gradients from x = 0, with no stopping rule; differentiable.

    A row whose residual vanishes takes steps of length 0, where 0/0 would give NaN. `guard` is added to the
    denominators, as implementations often do against 0/0; the map is then no longer linear in the size of q.
    """
    x, residual, d = torch.zeros_like(q), q, q
    size = vecdot(residual, residual).unsqueeze(-1)
    for _ in range(30):
        a_d = system.apply(d)
        length = _ratio(size, vecdot(d, a_d).unsqueeze(-1) + guard)
        x = x + length * d
        residual = residual - length * a_d
        before, size = size, vecdot(residual, residual).unsqueeze(-1)
        d = residual + _ratio(size, before + guard) * d
    return x


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over/under with its derivative, both 0 where `under` is 0."""
    gone = under == 0.0
    return (over / under.masked_fill(gone, 1.0)).masked_fill(gone, 0.0)


class _Adjoint(torch.autograd.Function):
    """Zero forward; backward multiplies by the approximate inverse of A."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, system: PlainSystem, solve: Solve) -> Tensor:
        ctx.system, ctx.solve = system, solve
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.solve(ctx.system, grads[0]), None, None


def implicitly(solve: Solve) -> Solve:
    """`solve` with the gradient of the exact solution: of r = q - A x at fixed x, times A^-1 by `solve`."""

    def solved(system: PlainSystem, q: Tensor) -> Tensor:
        with torch.no_grad():
            x = solve(system, q)
        return x + _Adjoint.apply(q - system.apply(x), system, solve)

    return solved


def plain_gka(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gk: Tensor | None, alpha: Tensor | None, *,
    solve: Solve, ridge_ratio: float = 0.02, constant: float = 0.0, beta: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """The map of `chunk_gka` with `solve` as its solver, and lambda_t = ridge_ratio F_t + constant.

    Nothing waits for the device, so that CUDA graphs may hold it.

    Args: as `chunk_gka`; T is a multiple of 64, or at most 64. 16-bit inputs are computed in float32 with
        products of 16-bit operands.
        solve: (systems, right-hand sides [B,H,N,C,K]) -> solutions.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    chunk = min(CHUNK, q.shape[1])

    def cut(x: Tensor) -> Tensor:
        return x.to(work).transpose(1, 2).unflatten(2, (-1, chunk))

    with torch.autocast(q.device.type, enabled=False):
        keys = cut(k) if beta is None else cut(beta).unsqueeze(-1) * cut(k)
        decay = torch.zeros_like(keys[..., 0]) if gk is None else cut(gk)
        system = plain_system(keys, decay, ridge_ratio, q.dtype, constant)
        x = solve(system, cut(q)).flatten(2, 3).transpose(1, 2)
        z = x if alpha is None else q + alpha.unsqueeze(-1) * (x - q)
    o, _ = chunk_simple_gla(z.to(q.dtype), k, v, g, scale, beta=beta)
    return o, None
