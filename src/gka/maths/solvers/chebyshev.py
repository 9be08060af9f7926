"""Chebyshev iteration for (H_t + lambda_t I) x_t = q_t (paper: section 4.1, algorithm 1).

The eigenvalues of A_t = H_t + lambda_t I lie in [lambda_t, lambda_t + F_t] with lambda_t = a F_t,
so rho = (L - mu)/(L + mu) = 1/(1 + 2a) and the weights omega_i are the same for every token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gka.maths.ridge import System, frobenius


def chebyshev_weights(ridge_ratio: float, num_iter: int) -> list[float]:
    """omega_1 .. omega_r of omega_i = 4 / (4 - rho^2 omega_{i-1}), omega_0 = 2, rho = 1/(1 + 2a)."""
    rho = 1.0 / (1.0 + 2.0 * ridge_ratio)
    weights = [2.0]
    for _ in range(num_iter):
        weights.append(4.0 / (4.0 - rho * rho * weights[-1]))
    return weights[1:]


def chebyshev_bound(ridge_ratio: float, num_iter: int) -> float:
    """2 R^(r+1), the bound on |x_r - x*|_A / |x*|_A, R = (sqrt(kappa) - 1)/(sqrt(kappa) + 1).

    kappa = (1 + a)/a is the largest condition number that lambda_t = a F_t allows.
    """
    root = ((1.0 + ridge_ratio) / ridge_ratio) ** 0.5
    return 2.0 * ((root - 1.0) / (root + 1.0)) ** (num_iter + 1)


def convergence_rate(ridge_ratio: float) -> float:
    """acosh(1 + 2a): what one step adds to the logarithm of 1/error."""
    return 2.0 * math.asinh(ridge_ratio**0.5)


def chebyshev_error(ridge_ratio: float, num_iter: int) -> float:
    """1/T_{r+1}(1 + 2a), the largest |x_r - x*|_A / |x*|_A that the spectrum allows."""
    decay = math.exp(-(num_iter + 1) * convergence_rate(ridge_ratio))
    return 2.0 * decay / (1.0 + decay * decay)


def chebyshev_solve(
    apply_h: Callable[[Tensor], Tensor], q: Tensor, fro: Tensor, ridge_ratio: float, num_iter: int
) -> Tensor:
    """x_r = p_r(A) q by `num_iter` steps of the residual form (Saad, Iterative Methods, alg. 12.1).

    The same polynomial as the three-term recursion in x. It keeps the residual r and the update d,
        r -= A d,  d = (omega_i - 1) d + (2 omega_i/(L + mu)) r,  x += d,
    which rounds better if the product takes 16-bit operands (docs/numerics.md).

    Args:
        apply_h: the product with H_t of every row of its argument, [..., K] -> [..., K].
        q: right-hand sides [..., K].
        fro: F_t > 0, [...]. Rows of an empty history need q = 0 and any positive F_t.
        ridge_ratio: a in lambda_t = a F_t.
        num_iter: r >= 1.

    Returns:
        x [..., K] in q's dtype.
    """
    fro = fro.unsqueeze(-1)
    step = 2.0 / ((1.0 + 2.0 * ridge_ratio) * fro)  # 2/(L + mu)
    lamb = ridge_ratio * fro
    residual = q.clone()
    d = step * q
    x = d.clone()
    for omega in chebyshev_weights(ridge_ratio, num_iter):
        residual = residual - (apply_h(d) + lamb * d)
        d = (omega - 1.0) * d + (omega * step) * residual
        x = x + d
    return x


class Plan(Protocol):
    """The rule by which the residual form computes its updates d."""

    def first(self, q: Tensor) -> Tensor:
        """d_0 = x_0, a new tensor [..., K]."""
        ...

    def next_(self, d: Tensor, residual: Tensor, i: int) -> None:
        """d_{i-1} -> d_i in place, from the residual of x_{i-1}, i = 1..n."""
        ...


@dataclass(frozen=True)
class ChebyshevPlan:
    """Chebyshev iteration on the spectrum [a F_t, (1 + a) F_t]: the same weights for every token.

    Attributes:
        step: 2/(L + mu) = 2/((1 + 2a) F_t), [..., 1].
        weights: omega_1 .. omega_r.
    """

    step: Tensor
    weights: list[float]

    def first(self, q: Tensor) -> Tensor:
        return self.step * q

    def next_(self, d: Tensor, residual: Tensor, i: int) -> None:
        omega = self.weights[i - 1]
        d.mul_(omega - 1.0).addcmul_(self.step, residual, value=omega)


def iterate_(
    apply_h: Callable[[Tensor], Tensor],
    lamb: Tensor,
    plan: Plan,
    residual: Tensor,
    d: Tensor,
    x: Tensor,
    steps: range,
) -> None:
    """Run steps of the residual form, updating its three arrays in place; not differentiable.

    Args:
        apply_h: the product with H_t of every row of its argument, [..., K] -> [..., K]. It may
            return a buffer of its own: it is read before the next call.
        lamb: lambda_t [..., 1].
        plan: the updates of each step.
        residual, d, x: [..., K]; before step 1: q, plan.first(q), and a copy of the latter.
        steps: numbers of the steps, from 1.
    """
    for i in steps:
        residual.sub_(apply_h(d)).addcmul_(lamb, d, value=-1.0)
        plan.next_(d, residual, i)
        x.add_(d)


def chebyshev_solve_(
    apply_h: Callable[[Tensor], Tensor], q: Tensor, fro: Tensor, ridge_ratio: float, num_iter: int
) -> Tensor:
    """`chebyshev_solve` with its arrays updated in place; not differentiable, `q` untouched."""
    fro = fro.unsqueeze(-1)
    weights = chebyshev_weights(ridge_ratio, num_iter)
    plan = ChebyshevPlan(2.0 / ((1.0 + 2.0 * ridge_ratio) * fro), weights)
    d = plan.first(q)
    x = d.clone()
    iterate_(apply_h, ridge_ratio * fro, plan, q.clone(), d, x, range(1, num_iter + 1))
    return x


@dataclass(frozen=True)
class Chebyshev:
    """r = num_iter steps for every token, a = ridge_ratio."""

    adaptive: ClassVar[bool] = False
    ridge_ratio: float
    num_iter: int

    def solve(self, system: System, q: Tensor) -> Tensor:
        """x_t = p_r(A_t) q_t [M,H,C,K] of the systems of some chunks, zero where the history is empty."""
        q = q.masked_fill(system.empty.unsqueeze(-1), 0.0)
        return chebyshev_solve_(system.products, q, system.fro, self.ridge_ratio, self.num_iter)

    def solve_state(self, h: Tensor, q: Tensor) -> Tensor:
        """x [B,H,K] of states H [B,H,K,K]. H is symmetric, and on a CPU d^T H is several times as fast
        as H d."""
        fro, empty = frobenius(h)
        q = q.masked_fill(empty.unsqueeze(-1), 0.0)

        def apply(d: Tensor) -> Tensor:
            return (d.unsqueeze(-2) @ h).squeeze(-2)

        return chebyshev_solve_(apply, q, fro, self.ridge_ratio, self.num_iter)

    def steps(self, system: System, q: Tensor) -> Tensor:
        """Steps of each chunk and head, int64 [M,H]."""
        return system.h_norm_squared.new_full(
            system.h_norm_squared.shape, self.num_iter, dtype=torch.int64
        )
