"""Device arrays that a call's kernels hand to each other."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """H or U of some heads at chunk starts, and after the last chunk.

    Attributes:
        states: S_[c] / scale [M,G,K,width], in the operands' dtype.
        scales: a bound on |S_[c]| of every block of columns [M,G,blocks]; one for all blocks of H.
        norms: sums of S_[c]^2 over every block of columns [M,G,blocks]; H only.
        final: [N,H,K,width]; None where it is not wanted.
    """

    states: Tensor
    scales: Tensor
    norms: Tensor
    final: Tensor | None

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        return self.states, self.scales


@dataclass(frozen=True)
class Maxima:
    """Largest magnitudes in a chunk's rows: of k and z [M,G], of blocks of v and do [M,G,NV].

    Of Hopper's kernels that of z is a bound, and one number for all blocks.
    """

    k: Tensor
    v: Tensor
    z: Tensor
    d: Tensor


@dataclass(frozen=True)
class Ends:
    """Gradients of a state at chunk ends, divided by their scales, and decay * <S_[c], E> of every chunk."""

    states: Tensor
    scales: Tensor
    wholes: Tensor

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.states, self.scales, self.wholes


@dataclass(frozen=True)
class Adjoint:
    """What the solve's derivative leaves for the gradients: y and numbers per token or chunk, of G heads."""

    y: Tensor
    y_scale: Tensor
    w_t: Tensor  # of Triton's kernels: p_t
    fro: Tensor | None  # of Triton's kernels only
    start_h: Tensor
    key_weight: Tensor
    start_weight: Tensor


@dataclass(frozen=True)
class Certificate:
    """What the adaptive solver knows of the chunks of G heads.

    Attributes:
        w: w_t in the operands' dtype [tokens,G,K]; tau: its factor in P_t^-1 [tokens,G].
        phi, steps: of each chunk [M,G]; steps are int32.
    """

    w: Tensor
    tau: Tensor
    phi: Tensor
    steps: Tensor

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.w, self.tau, self.phi, self.steps


@dataclass(frozen=True)
class Heads:
    """G heads of the H, from head `base` on, that are worked on together."""

    base: int
    count: int

    @property
    def args(self) -> tuple[int, int]:
        return self.base, self.count
