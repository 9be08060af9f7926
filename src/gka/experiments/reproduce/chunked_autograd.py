"""The chunk-wise map in plain torch, differentiable by autograd in two ways, with either ridge.

It serves ablations that the library's op does not have: a ridge lambda_t = c that does not follow F_t, and
the derivative of the truncated iteration itself. The op has neither on purpose. Its error bounds, and the
certificates of its solvers, rest on lambda_t = a F_t, which bounds the condition number; and its gradient is
that of the exact solve, evaluated at the computed solutions (docs/maths.md, section 8).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Derivative = Literal["implicit", "iteration"]


@dataclass(frozen=True)
class Ridge:
    """lambda_t = ratio F_t + constant, and the steps that solve with it.

    Attributes:
        ratio: a >= 0. constant: c >= 0. One of them is above 0.
        num_iter: Chebyshev steps r >= 1 on [lambda_t, lambda_t + F_t].
        derivative: "implicit": of the exact solve, at the computed solutions; "iteration": of the r steps.
    """

    ratio: float = 0.02
    constant: float = 0.0
    num_iter: int = 30
    derivative: Derivative = "implicit"


def chunk_gka_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    scale: float,
    ridge: Ridge,
    chunk_size: int = 64,
) -> Tensor:
    """o_t = scale U_t^T z_t, z_t = q_t + alpha_t (x_t - q_t), (H_t + lambda_t I) x_t = q_t.

    Computed in float32 (float64 for float64 inputs). Sequences begin without a state; every history must be
    non-empty, as it is with keys of norm 1. The device is never waited for, so CUDA graphs may hold it.

    Args:
        q, k: [B,T,H,K]. v: [B,T,H,V].
        g, gk: log decays of U and of H [B,T,H]; None: no decay.
        alpha, beta: mix gate and write gate [B,T,H]; None: 1.

    Returns:
        o [B,T,H,V] in q's dtype.
    """
    dtype, length = q.dtype, q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        if beta is not None:
            k, v = beta.unsqueeze(-1) * k, beta.unsqueeze(-1) * v
        cut = [None if x is None else _cut(x, chunk_size) for x in (q, k, v, g, gk, alpha)]
        q, k, v, g, gk, alpha = cut
        decay_u = _Decay(g, k)
        decay_h = decay_u if gk is g else _Decay(gk, k)
        x = _solve(_Systems(k, decay_h), q, ridge)
        z = x if alpha is None else q + alpha.unsqueeze(-1) * (x - q)
        u = decay_u.starts(k, v)
        o = decay_u.zeta.unsqueeze(-1) * (z @ u) + ((z @ k.mT) * decay_u.mask) @ v
        o = scale * o.flatten(2, 3).transpose(1, 2)
    return o[:, :length].to(dtype)


def _cut(x: Tensor, chunk_size: int) -> Tensor:
    """[B,T,H,...] -> [B,H,N,C,...], zeros behind the last token."""
    x = x if x.dtype == torch.float64 else x.float()
    missing = -x.shape[1] % chunk_size
    x = pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, chunk_size)).movedim(3, 1)


class _Decay:
    """Decays inside chunks, of log decays [B,H,N,C]; None: none."""

    def __init__(self, g: Tensor | None, like: Tensor) -> None:
        b = like.new_zeros(like.shape[:-1]) if g is None else g.cumsum(-1)
        future = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).triu(1)
        steps = (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(future, -torch.inf)
        self.mask, self.zeta = steps.exp(), b.exp()  # M_jt as rows t, and from the start to t
        self.to_end, self.whole = (b[..., -1:] - b).exp(), b[..., -1].exp()

    def starts(self, k: Tensor, v: Tensor) -> Tensor:
        """Sums of k v^T at chunk starts [B,H,N,K,V]."""
        local = (self.to_end.unsqueeze(-1) * k).mT @ v
        state, found = torch.zeros_like(local[:, :, 0]), []
        for n in range(local.shape[2]):
            found.append(state)
            state = self.whole[:, :, n, None, None] * state + local[:, :, n]
        return torch.stack(found, 2)


class _Systems:
    """H_t of every token, never formed: products, and F_t [B,H,N,C]."""

    def __init__(self, k: Tensor, decay: _Decay) -> None:
        self.k, self.decay, self.h = k, decay, decay.starts(k, k)
        energies = ((k @ self.h) * k).sum(-1)
        start = decay.zeta.square() * self.h.square().sum((-2, -1)).unsqueeze(-1)
        cross = 2.0 * decay.zeta * (decay.mask @ energies.unsqueeze(-1)).squeeze(-1)
        pairs = (decay.mask * (decay.mask @ (k @ k.mT).square())).sum(-1)
        # zeros behind the last token make a row that fades, never one of 0
        self.fro = (start + cross + pairs).clamp_min(torch.finfo(k.dtype).tiny).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """H_t x_t of rows x_t [B,H,N,C,K]."""
        inside = ((x @ self.k.mT) * self.decay.mask) @ self.k
        return self.decay.zeta.unsqueeze(-1) * (x @ self.h) + inside


def chebyshev(
    apply_h: Callable[[Tensor], Tensor], q: Tensor, fro: Tensor, lamb: Tensor, num_iter: int
) -> Tensor:
    """x_r of (H + lambda I) x = q by Chebyshev iteration on [lambda_t, lambda_t + F_t], any lambda_t > 0.

    The residual form of `gka.maths.solvers.chebyshev`, whose weights here differ by token.

    Args:
        q: [...,K]. fro, lamb: [...].
    """
    fro, lamb = fro.unsqueeze(-1), lamb.unsqueeze(-1)
    step = 2.0 / (2.0 * lamb + fro)  # 2/(L + mu)
    rho2, omega = (fro / (2.0 * lamb + fro)).square(), 2.0
    residual, d = q, step * q
    x = d
    for _ in range(num_iter):
        omega = 4.0 / (4.0 - rho2 * omega)
        residual = residual - (apply_h(d) + lamb * d)
        d = (omega - 1.0) * d + (omega * step) * residual
        x = x + d
    return x


class _Correction(torch.autograd.Function):
    """A^-1 r of the residual r of a solution, which is 0 where it is exact; its derivative is a solve."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return ctx.solve(dx), None


def _solve(systems: _Systems, q: Tensor, ridge: Ridge) -> Tensor:
    """x_t by the ridge's steps, differentiable as it says.

    Implicitly: x = x_r + A^-1 (q - A x_r) with x_r a constant, so that y = A^-1 dx meets q, H and lambda.
    """
    lamb = ridge.ratio * systems.fro + ridge.constant
    if ridge.derivative == "iteration":
        return chebyshev(systems, q, systems.fro, lamb, ridge.num_iter)

    def solve(b: Tensor) -> Tensor:
        with torch.no_grad():
            return chebyshev(systems, b, systems.fro, lamb, ridge.num_iter)

    x = solve(q)
    residual = q - (systems(x) + lamb.unsqueeze(-1) * x)
    return x + _Correction.apply(residual, solve)  # pyright: ignore[reportOperatorIssue]
