"""What callers give, as compiled kernels take it for granted: contiguous, aligned; states float32."""

from typing import overload

from torch import Tensor

from gka.maths.chunked import Tokens

Boundary = tuple[Tensor | None, Tensor | None]  # a state and the largest entry of each head


def prepared(tokens: Tokens, float_gates: bool) -> Tokens:
    """Contiguous and aligned, as compiled kernels take for granted."""
    t = tokens

    def gate(x: Tensor | None) -> Tensor | None:
        x = aligned(x)
        return None if x is None else x.float() if float_gates else x

    return Tokens(
        aligned(t.q), aligned(t.k), aligned(t.v), gate(t.g), gate(t.gk), gate(t.alpha), gate(t.beta),
        aligned(t.h0), aligned(t.u0), t.cu_seqlens, t.cu_seqlens_cpu,
    )  # fmt: skip


@overload
def aligned(x: Tensor) -> Tensor: ...
@overload
def aligned(x: None) -> None: ...
@overload
def aligned(x: Tensor | None) -> Tensor | None: ...
def aligned(x: Tensor | None) -> Tensor | None:
    """x, contiguous; a copy where its memory does not start at 16 bytes (a view into a larger tensor)."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def boundary(state: Tensor | None, measured: bool) -> Boundary:
    """A boundary state [N,H,K,V] as float32, and if `measured` the largest entry of each head."""
    if state is None:
        return None, None
    state = aligned(state.float())
    return state, state.abs().amax((-1, -2)) if measured else None
