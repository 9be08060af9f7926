"""Device arrays that the steps of a pass exchange."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Boundary = tuple[Tensor | None, Tensor | None]  # a state and the largest entry of each head


class Heads(NamedTuple):
    """A group of heads, processed together: `count` of the H, from head `base` on."""

    base: int
    count: int


@dataclass(frozen=True)
class Moments:
    """H or U of some heads at chunk starts, and after the last chunk.

    Attributes:
        start: S_[c] / scale [M,G,K,width], in the operands' dtype: h_start or u_start.
        scales: an upper bound of |S_[c]| for every block of columns [M,G,blocks]; for H one for all blocks.
        norms: sums of S_[c]^2 over every block of columns [M,G,blocks]; H only.
        final: [N,H,K,width]; None if not wanted.
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
    """Largest magnitudes in a chunk: of k and z [M,G], of each block of columns of v and do [M,G,NV].

    From Hopper's kernels, that of z is an upper bound, and all blocks have one number.
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
    """Results of the adjoint solve that the gradients read: y and numbers per token or chunk, of G heads.

    Triton's kernels store p_t = 2 a <x_t, y_t> and F_t instead of w_t = p_t / F_t.
    """

    y: Tensor
    y_scale: Tensor
    w_t: Tensor
    start_h: Tensor
    key_weight: Tensor
    start_weight: Tensor


class Certificate(NamedTuple):
    """The adaptive solver's certificate for the chunks of G heads.

    Attributes:
        w: w_t in the operands' dtype [tokens,G,K].
        tau: factor of w_t w_t^T in P_t^-1 [tokens,G].
        phi, steps: of each chunk [M,G]; steps are int32.
    """

    w: Tensor
    tau: Tensor
    phi: Tensor
    steps: Tensor


class HeadPart(NamedTuple):
    """The array for a group's gradient of shared heads, its first head and its number of heads."""

    array: Tensor
    first: int
    heads: int


@dataclass(frozen=True)
class Group:
    """A group of heads' arrays in the backward pass. All are scratch, except dk and dv of unshared heads.

    Attributes:
        h: None if no gradient needs H. adjoint: None without a solve.
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
    """Gradients that the backward pass writes; None for an absent input. dbeta2: gradient of beta^2."""

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
    """Arrays of all heads that the steps of the backward pass read and write.

    Attributes:
        solutions: from the forward pass.
        do: [B,T,H,V]. dh_final, du_final: gradients of the final states.
        grads: the results.
    """

    solutions: Solutions
    do: Tensor
    dh_final: Boundary
    du_final: Boundary
    grads: InputGradients
