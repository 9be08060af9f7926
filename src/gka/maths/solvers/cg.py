"""Conjugate gradients that stop where their own residual proves the error of num_iter Chebyshev steps.

In A = A_t/F_t = H_t/F_t + a I, whose eigenvalues lie in [a, 1 + a], every row q = q_t takes steps
    s = |r|^2/(d.A d),  x += s d,  r -= s A d,  d <- r + (|r|^2/|r before|^2) d,  at first x = 0, r = d = q
(Hestenes and Stiefel, 1952) until its residual r proves |x - x*|_A <= target |x*|_A (docs/numerics.md):
    |r|^2 / a <= target^2 x.(q + r),  target = 1/T_n(1 + 2a),  n = num_iter + 1.
A proven row stops, so no row depends on another; a chunk is done when its slowest row is proven. Then
r = q - A x is computed directly, and rows that fail the test with it continue from there. The map q_t -> x_t
is not linear: the gradient is that of the exact solution, by a solve with the same certificate.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vecdot

from gka.maths.ridge import Products, System, frobenius
from gka.maths.solvers.chebyshev import chebyshev_error, chebyshev_solve_, convergence_rate

# Factor of the target that the updated residual must prove, which leaves room for its drift.
MARGIN = 31 / 32
# Of the kernels: A d is computed in units of lambda = a F, but of no less than this times F, so that weights
# over the unit stay finite in float16.
LEAST_UNIT = 2.0**-10
# Of the kernels with 16-bit operands, where a < LEAST_UNIT: least d.A d / |d|^2 at which a row goes on.
# Products round at 2^-11, so directions below it have no certain curvature, and a step along one any length.
LEAST_CURVATURE = 2.0**-10
# |r|^2 beyond which a row ends, before float32 overflows.
LARGEST_SIZE = 1e37
# To which the kernels clamp d's entries where a < LEAST_UNIT, below float16's limit.
LARGEST_ENTRY = 60000.0
# Share of done chunks at which they are dropped from the arrays: the copy costs a fifth of a step.
LEAVE = 0.25
# Size to which q's largest entry is scaled, so that H_t d does not overflow and |r|^2 does not underflow.
ENTRY = 2.0**-10


def rounding_floor(ridge_ratio: float, dtype: torch.dtype) -> float:
    """8 kappa eps: the smallest error that a residual in this precision can prove."""
    return 8.0 * (1.0 + ridge_ratio) / ridge_ratio * torch.finfo(dtype).eps


def most_steps(ridge_ratio: float, num_iter: int) -> int:
    """The number of steps after which the certificate holds in exact arithmetic for every H_t and q_t.

    Smallest n with sinh(n b) >= kappa^1/2 / (MARGIN target), b = acosh(1 + 2a): 39 at the defaults.
    """
    rate = convergence_rate(ridge_ratio)
    share = ((1.0 + ridge_ratio) / ridge_ratio) ** 0.5 / MARGIN
    size = (num_iter + 1) * rate  # target = 1/cosh(size)
    if size < 300.0:
        return math.ceil(math.asinh(share * math.cosh(size)) / rate)
    return math.ceil((size + math.log(share)) / rate)


def limits(ridge_ratio: float, num_iter: int, operands: torch.dtype) -> tuple[int, float]:
    """(most steps, a s^2): a row stops at |r|^2 <= a s^2 x.(q + r), s just below the target.

    s is at least a quarter of the operands' epsilon: rounding hides a smaller error.
    """
    share = max(MARGIN * chebyshev_error(ridge_ratio, num_iter), torch.finfo(operands).eps / 4.0)
    return most_steps(ridge_ratio, num_iter), ridge_ratio * share**2


@dataclass
class Rows:
    """The iteration's arrays of U chunks: rows [U,G,C,K] and numbers [U,G,C], updated in place.

    Attributes:
        products: the map x -> (H_t/F_t) x.
        ridge_ratio: a.
        q: right-hand sides, zero where the history is empty, of largest entry ENTRY.
        x, residual, d: the solution times F_t, r and d.
        size: |r|^2.
        energy: x.(q + r); between restarts the sum of the steps' s |r|^2, equal but for rounding.
        done: rows that take no more steps.
    """

    products: Products
    ridge_ratio: float
    q: Tensor
    x: Tensor
    residual: Tensor
    d: Tensor
    size: Tensor
    energy: Tensor
    done: Tensor

    @classmethod
    def start(cls, products: Products, ridge_ratio: float, fro: Tensor, q: Tensor) -> "Rows":
        """Start at x = 0, for the map x -> H_t x and q."""
        size, nothing = vecdot(q, q), torch.zeros_like(q)
        weights = products.weights / fro.unsqueeze(-1)
        relative = Products(products.k, products.h, products.zeta / fro, weights)
        done = ~(size > 0.0)  # NaN too
        return cls(
            relative, ridge_ratio, q, nothing, q.clone(), q.clone(), size, nothing[..., 0], done
        )

    def take(self, units: Tensor) -> "Rows":
        """A copy of some chunks."""
        numbers = (self.size, self.energy, self.done)
        parts = (self.q, self.x, self.residual, self.d, *numbers)
        products = self.products.map(lambda y: y[units])
        return Rows(products, self.ridge_ratio, *(y[units] for y in parts))

    def apply(self, x: Tensor) -> Tensor:
        """(A_t/F_t) x."""
        return self.products(x).add_(x, alpha=self.ridge_ratio)

    def proven(self, stop: float) -> Tensor:
        """Whether |r|^2 <= stop x.(q + r); false if a number is not finite."""
        return self.size <= stop * self.energy

    def step_(self, stop: float) -> None:
        """One step of the rows that are not done; marks those that prove it or are not finite."""
        a_d = self.apply(self.d)
        length = (self.size / vecdot(self.d, a_d)).masked_fill_(self.done, 0.0)
        self.energy = torch.addcmul(self.energy, length, self.size)
        length = length.unsqueeze(-1)
        self.x.addcmul_(length, self.d)
        self.residual.addcmul_(length, a_d, value=-1.0)
        before, self.size = self.size, vecdot(self.residual, self.residual)
        self.done |= self.proven(stop) | ~self.size.isfinite()
        keep = (self.size / before).masked_fill_(self.done, 0.0).unsqueeze(-1)
        self.d.mul_(keep).add_(self.residual)

    def restart_(self, target: float) -> Tensor:
        """Set r = q - A x and d = r; returns the rows that prove the target. The others continue."""
        self.residual = self.q - self.apply(self.x)
        self.d, self.size = self.residual.clone(), vecdot(self.residual, self.residual)
        self.energy = vecdot(self.x, self.q) + vecdot(self.x, self.residual)
        proven = self.proven(self.ridge_ratio * target**2)
        self.done = proven | ~self.size.isfinite()
        return proven


def iterate_(rows: Rows, counts: Tensor, stop: float, most: int) -> int:
    """Take at most `most` steps until all rows are done; returns the number of steps.

    Args:
        counts: int64 [U,G], increased by the steps of each chunk and head.
    """
    units, part, taken = torch.arange(len(counts), device=counts.device), rows, 0
    while taken < most:
        working = ~part.done.all(-1)
        left = working.any(-1)
        remaining = int(left.sum())
        if remaining == 0:
            break
        if remaining <= (1.0 - LEAVE) * len(units):
            if part is not rows:
                rows.x[units] = part.x
            units, part, working = units[left], part.take(left), working[left]
        counts[units] += working
        part.step_(stop)
        taken += 1
    if part is not rows:
        rows.x[units] = part.x
    return taken


@dataclass(frozen=True)
class ConjugateGradients:
    """Conjugate gradients until the error of num_iter Chebyshev steps is proven; a = ridge_ratio."""

    adaptive: ClassVar[bool] = True
    ridge_ratio: float
    num_iter: int

    def solve(self, system: System, q: Tensor) -> Tensor:
        """x_t [M,H,C,K] of some chunks, zero where the history is empty."""
        return self._solve_system(system, q)[0]

    def solve_state(self, h: Tensor, q: Tensor) -> Tensor:
        """x [B,H,K] of states H [B,H,K,K], chunks of one token."""
        fro, empty = frobenius(h)
        q = q.masked_fill(empty.unsqueeze(-1), 0.0).unsqueeze(-2)
        nothing = h.new_zeros(h.shape[0], 1, 1, h.shape[-1])
        zero = h.new_zeros(*h.shape[:2], 1, 1)
        products = Products(nothing, h, torch.ones_like(zero[..., 0]), zero)
        return self._solve(products, fro.unsqueeze(-1), q)[0].squeeze(-2)

    def steps(self, system: System, q: Tensor) -> Tensor:
        """Steps of the slowest token of each chunk and head, int64 [M,H]."""
        return self._solve_system(system, q)[1]

    def _solve_system(self, system: System, q: Tensor) -> tuple[Tensor, Tensor]:
        """(x [M,H,C,K], steps [M,H]). A unit is one chunk's heads that share a key head."""
        q = q.masked_fill(system.empty.unsqueeze(-1), 0.0)
        groups = (system.k.shape[1], -1)

        def units(x: Tensor) -> Tensor:
            return x.unflatten(1, groups).flatten(0, 1)

        found = self._solve(system.products.map(units), units(system.fro), units(q))
        x, counts = (y.unflatten(0, (len(q), groups[0])).flatten(1, 2) for y in found)
        return x, counts

    def _solve(self, products: Products, fro: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """(x [U,G,C,K], steps [U,G]) for right-hand sides q that are zero where the history is empty."""
        a, dtype = self.ridge_ratio, q.dtype
        target = chebyshev_error(a, self.num_iter)
        left, stop = limits(a, self.num_iter, dtype)
        unit = q.abs().amax(-1, keepdim=True)
        unit = unit.masked_fill(unit == 0.0, 1.0)
        rows = Rows.start(products, a, fro, (q / unit).mul_(ENTRY))
        counts = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
        while True:
            left -= iterate_(rows, counts, stop, left)
            proven = rows.restart_(max(target, rounding_floor(a, dtype)))
            if left == 0 or bool(rows.done.all()):
                break
        x = rows.x.div_(ENTRY).div_(fro.unsqueeze(-1)).mul_(unit)
        return self._finish(products, fro, q, x, counts, proven)

    def _finish(
        self, products: Products, fro: Tensor, q: Tensor, x: Tensor, counts: Tensor, proven: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows still unproven, for rounding or non-finite numbers, get num_iter Chebyshev steps."""
        if bool(proven.all()):
            return x, counts
        plain = chebyshev_solve_(products, q, fro, self.ridge_ratio, self.num_iter)
        counts += self.num_iter * ~proven.all(-1)
        return x.where(proven.unsqueeze(-1), plain), counts
