"""The protocol of a backend: the steps of the passes, each a list of launches that `execute` runs in order.

`forward`, `backward` and `decode` order the steps; `triton` and `hopper` implement them.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from gka.kernels.arrays import BackwardArrays, Ends, Group, Heads, Maxima, Moments, Solutions
from gka.kernels.call import GpuCall, Needs
from gka.maths.chunked import Settings, Tokens
from gka.maths.recurrent import States


class Launch(NamedTuple):
    """One launch: `kernel(grid, *arguments)` starts it on the current device and stream.

    `keeps`: tensors that the arguments reference by address only, kept alive until the launch.
    """

    kernel: Callable[..., None]
    grid: tuple[int, ...]
    arguments: tuple
    keeps: tuple = ()


Executor = Callable[[Iterable[Launch]], None]


def execute(launches: Iterable[Launch]) -> None:
    """Start the launches, one after another."""
    for kernel, grid, arguments, _ in launches:
        kernel(grid, *arguments)


class Passes(Needs, Protocol):
    """The steps of both passes and of decoding in one backend's kernels."""

    def ends(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments
    ) -> tuple[Ends | None, Ends]:
        """Memory for E, the gradients at chunk ends, of H (None without H) and of U."""
        ...

    def scan(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments, maxima: Maxima | None
    ) -> list[Launch]:
        """H (unless None) and U at chunk starts, final states if wanted, largest keys and values."""
        ...

    def solve_and_readout(
        self,
        call: GpuCall,
        heads: Heads,
        h: Moments | None,
        u: Moments,
        solutions: Solutions,
        o: Tensor,
    ) -> list[Launch]:
        """x_t if there is a solve, and o_t."""
        ...

    def count_steps(
        self, call: GpuCall, heads: Heads, h: Moments, u: Moments, steps: Tensor
    ) -> list[Launch]:
        """Write to `steps`, int32 [M,H], those of "adaptive" or "cg" in each chunk and head."""
        ...

    def adjoint(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """Adjoints of readout and mix, and the adjoint solve: dq, d alpha, `group.adjoint`."""
        ...

    def scan_back(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """E of H and U at chunk ends, and the gradients of the initial states."""
        ...

    def gradients(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """Gradients of keys, values, decays and the write gate."""
        ...

    def step(
        self, tokens: Tokens, settings: Settings, states: States, commit: bool, o: Tensor,
        x: Tensor | None,
    ) -> list[Launch]:  # fmt: skip
        """`maths.recurrent.step_`."""
        ...

    def advance(
        self, tokens: Tokens, settings: Settings, states: States, counts: Tensor
    ) -> list[Launch]:
        """`maths.recurrent.advance_`."""
        ...
