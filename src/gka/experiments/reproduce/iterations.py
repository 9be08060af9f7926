"""Iterative solvers of (H + lambda I) x = q in several precisions, with the iterate after every product.

All know the same bounds of the spectrum, [lambda, lambda + F]. Iterate i has used i products with H. The
precision of a product's operands is emulated, so that the figures are the same on every device: operands are
rounded, products and sums are float32 (float64 for "float64"), and so is everything else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from gka.maths.ridge import System
from gka.maths.solvers.adaptive import AdaptivePlan, nystroem
from gka.maths.solvers.chebyshev import ChebyshevPlan, Plan, chebyshev_weights, iterate_

PRECISIONS = ("float64", "float32", "TF32", "bfloat16")
_TF32_DROPPED = 13  # mantissa bits of float32 that TF32 lacks


def rounded(x: Tensor, precision: str) -> Tensor:
    """x [...] rounded to nearest even in the operands' precision, in its own dtype."""
    if precision == "bfloat16":
        return x.bfloat16().to(x.dtype)
    if precision != "TF32":
        return x
    bits = x.view(torch.int32)
    half = (1 << (_TF32_DROPPED - 1)) - 1
    odd = (bits >> _TF32_DROPPED) & 1
    return ((bits + half + odd) & -(1 << _TF32_DROPPED)).view(torch.float32)


@dataclass(frozen=True)
class Ridge:
    """Systems (H + lambda I) x = q of a precision.

    Attributes:
        h: [S,1,K,K], its operands rounded. q: [S,1,1,K]. fro: F [S,1,1,1], of the unrounded H.
        ridge_ratio: a in lambda = a F.
        precision: a name of `PRECISIONS`.
    """

    h: Tensor
    q: Tensor
    fro: Tensor
    ridge_ratio: float
    precision: str

    @classmethod
    def of(cls, h: Tensor, q: Tensor, ridge_ratio: float, precision: str) -> "Ridge":
        """The systems of H [S,K,K] and q [S,K], both float64."""
        dtype = torch.float64 if precision == "float64" else torch.float32
        fro = h.square().sum((-2, -1)).sqrt()
        h_, q_ = rounded(h.to(dtype), precision)[:, None], q.to(dtype)[:, None, None]
        return cls(h_, q_, fro.to(dtype)[:, None, None, None], ridge_ratio, precision)

    def product(self, d: Tensor) -> Tensor:
        """H d of d [S,1,1,K]; H is symmetric."""
        return rounded(d, self.precision) @ self.h

    def apply(self, d: Tensor) -> Tensor:
        """(H + lambda I) d."""
        return self.product(d).addcmul_(self.ridge_ratio * self.fro, d)


def gradient_descent(ridge: Ridge, most: int) -> Iterator[Tensor]:
    """Steps of 2/(L + mu), the best fixed length; the first needs no product."""
    step = 2.0 / ((1.0 + 2.0 * ridge.ridge_ratio) * ridge.fro)
    x = step * ridge.q
    yield x
    for _ in range(most):
        x = x + step * (ridge.q - ridge.apply(x))
        yield x


def nesterov(ridge: Ridge, most: int) -> Iterator[Tensor]:
    """Accelerated gradient descent: steps of 1/L, momentum (k - 1)/(k + 1) with k = (L/mu)^1/2."""
    root = ((1.0 + ridge.ridge_ratio) / ridge.ridge_ratio) ** 0.5
    momentum = (root - 1.0) / (root + 1.0)
    step = 1.0 / ((1.0 + ridge.ridge_ratio) * ridge.fro)
    before = torch.zeros_like(ridge.q)
    x = step * ridge.q
    yield x
    for _ in range(most):
        ahead = x + momentum * (x - before)
        before, x = x, ahead + step * (ridge.q - ridge.apply(ahead))
        yield x


def conjugate_gradients(ridge: Ridge, most: int) -> Iterator[Tensor]:
    """Hestenes and Stiefel (1952), with no stopping rule; it needs no bounds of the spectrum."""
    x = torch.zeros_like(ridge.q)
    residual = d = ridge.q
    size = vecdot(residual, residual).unsqueeze(-1)
    yield x
    for _ in range(most):
        a_d = ridge.apply(d)
        length = _ratio(size, vecdot(d, a_d).unsqueeze(-1))
        x = x + length * d
        residual = residual - length * a_d
        before, size = size, vecdot(residual, residual).unsqueeze(-1)
        d = residual + _ratio(size, before) * d
        yield x


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over/under, 0 where `under` is 0: there the residual has vanished."""
    return over / under.masked_fill(under == 0.0, 1.0) * (under != 0.0)


def chebyshev(ridge: Ridge, most: int) -> Iterator[Tensor]:
    """The library's Chebyshev iteration."""
    step = 2.0 / ((1.0 + 2.0 * ridge.ridge_ratio) * ridge.fro)
    return _planned(
        ridge, ChebyshevPlan(step, chebyshev_weights(ridge.ridge_ratio, most)), most, most
    )


def adaptive(ridge: Ridge, most: int) -> Iterator[Tensor]:
    """The library's adaptive solver for the bound of `most` steps; a system stops after its own number."""
    system = System.of_state(ridge.h)
    operands = torch.bfloat16 if ridge.precision == "bfloat16" else None
    plan = AdaptivePlan.of(nystroem(system, operands), system.fro, ridge.ridge_ratio, most)
    return _planned(ridge, plan, most, plan.keep.shape[0])


def _planned(ridge: Ridge, plan: Plan, most: int, taken: int) -> Iterator[Tensor]:
    """Iterates of the residual form; after `taken` steps they stay as they are."""
    residual, d = ridge.q.clone(), plan.first(ridge.q)
    x, lamb = d.clone(), ridge.ridge_ratio * ridge.fro
    yield x
    for i in range(1, most + 1):
        if i <= taken:
            iterate_(ridge.product, lamb, plan, residual, d, x, range(i, i + 1))
        yield x


METHODS: dict[str, Callable[[Ridge, int], Iterator[Tensor]]] = {
    "gradient descent": gradient_descent,
    "Nesterov": nesterov,
    "conjugate gradients": conjugate_gradients,
    "Chebyshev": chebyshev,
    "adaptive": adaptive,
}


def residuals(h: Tensor, q: Tensor, ridge: Ridge, method: str, most: int) -> Tensor:
    """|A x_i - q| / |q| in float64 of iterates 0..most: [most + 1, S], for float64 H [S,K,K], q [S,K]."""
    lamb = ridge.ridge_ratio * h.square().sum((-2, -1)).sqrt().unsqueeze(-1)
    found = []
    for x in METHODS[method](ridge, most):
        y = x.double()[:, 0, 0]
        left = (y.unsqueeze(-2) @ h).squeeze(-2) + lamb * y - q
        found.append(left.norm(dim=-1) / q.norm(dim=-1))
    return torch.stack(found)
