"""Solvers of the ridge systems (H_t + lambda_t I) x_t = q_t: one per file, each a class with fields a and r.

`exact` is the oracle of the others.
"""

from typing import ClassVar, Literal, Protocol

from torch import Tensor

from gka.maths.ridge import System
from gka.maths.solvers.adaptive import Adaptive
from gka.maths.solvers.cg import ConjugateGradients
from gka.maths.solvers.chebyshev import Chebyshev

SolverName = Literal["chebyshev", "adaptive", "cg"]


class Solver(Protocol):
    """A solver with a = ridge_ratio and r = num_iter; `adaptive`: whether steps differ by chunk and head."""

    adaptive: ClassVar[bool]

    def solve(self, system: System, q: Tensor) -> Tensor:
        """x_t [M,H,C,K] of some chunks; zero where the history is empty."""
        ...

    def solve_state(self, h: Tensor, q: Tensor) -> Tensor:
        """x [B,H,K] of states H [B,H,K,K] and q [B,H,K]."""
        ...

    def steps(self, system: System, q: Tensor) -> Tensor:
        """Steps of each chunk and head, int64 [M,H]."""
        ...


SOLVERS: dict[SolverName, type[Chebyshev] | type[Adaptive] | type[ConjugateGradients]] = {
    "chebyshev": Chebyshev,
    "adaptive": Adaptive,
    "cg": ConjugateGradients,
}


def make_solver(name: SolverName, ridge_ratio: float, num_iter: int) -> Solver:
    """The solver of that name."""
    return SOLVERS[name](ridge_ratio, num_iter)
