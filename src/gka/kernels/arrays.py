"""Device arrays that the steps of a pass hand to each other."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Boundary = tuple[Tensor | None, Tensor | None]  # a state and the largest entry of each head


class Heads(NamedTuple):
    """`count` heads of the H, from head `base` on, that are worked on together."""

    base: int
    count: int


@dataclass(frozen=True)
class Moments:
    """H or U of some heads at chunk starts, and after the last chunk.

    Attributes:
        start: S_[c] / scale [M,G,K,width], in the operands' dtype: h_start or u_start.
        scales: a bound on |S_[c]| of every block of columns [M,G,blocks]; one for all blocks of H.
        norms: sums of S_[c]^2 over every block of columns [M,G,blocks]; H only.
        final: [N,H,K,width]; None where it is not wanted.
    """

    start: Tensor
    scales: Tensor
    norms: Tensor
    final: Tensor | None

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        return self.start, self.scales


class Solutions(NamedTuple):
    """x_t / x_scale_t [B,T,H,K] in the operands' dtype and x_scale [B,T,H]; None without a solve."""

    x: Tensor | None
    x_scale: Tensor | None


@dataclass(frozen=True)
class Maxima:
    """Largest magnitudes in a chunk's rows: of k and z [M,G], of blocks of v and do [M,G,NV].

    Of Hopper's kernels that of z is a bound, and one number for all blocks.
    """

    k: Tensor
    v: Tensor
    z: Tensor
    d: Tensor


class Ends(NamedTuple):
    """Gradients of a state at chunk ends, divided by their scales, and decay * <S_[c], E> of every chunk."""

    states: Tensor
    scales: Tensor
    wholes: Tensor


@dataclass(frozen=True)
class Adjoint:
    """What the adjoint solve leaves for the gradients: y and numbers per token or chunk, of G heads.

    Triton's kernels keep p_t = 2 a <x_t, y_t> in the place of w_t = p_t / F_t, and F_t beside it.
    """

    y: Tensor
    y_scale: Tensor
    w_t: Tensor
    start_h: Tensor
    key_weight: Tensor
    start_weight: Tensor


class Certificate(NamedTuple):
    """What the adaptive solver knows of the chunks of G heads.

    Attributes:
        w: w_t in the operands' dtype [tokens,G,K]; tau: its factor in P_t^-1 [tokens,G].
        phi, steps: of each chunk [M,G]; steps are int32.
    """

    w: Tensor
    tau: Tensor
    phi: Tensor
    steps: Tensor


class HeadPart(NamedTuple):
    """Where a group's gradient of shared heads goes: an array, its first head and its number of heads."""

    array: Tensor
    first: int
    heads: int


@dataclass(frozen=True)
class Group:
    """What a group of heads has in the backward pass; scratch but for dk and dv of heads that share nothing.

    Attributes:
        h: None where nothing of H is wanted. adjoint: None without a solve.
        start_u: scale zeta_t z_t . (U_[c] do_t) [tokens,G].
    """

    heads: Heads
    h: Moments | None
    u: Moments
    maxima: Maxima
    adjoint: Adjoint | None
    start_u: Tensor
    ends_h: Ends | None
    ends_u: Ends
    dk: HeadPart
    dv: HeadPart


class InputGradients(NamedTuple):
    """What the backward pass writes; None where there is no such input. dbeta2: of beta^2."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg_u: Tensor | None
    dg_h: Tensor | None
    dalpha: Tensor | None
    dbeta2: Tensor | None
    dh0: Tensor | None
    du0: Tensor | None


@dataclass(frozen=True)
class BackwardArrays:
    """What the steps of the backward pass read and write for all heads.

    Attributes:
        solutions: as the forward pass left them.
        do: [B,T,H,V]. dh_final, du_final: gradients of the final states.
        grads: written.
    """

    solutions: Solutions
    do: Tensor
    dh_final: Boundary
    du_final: Boundary
    grads: InputGradients
