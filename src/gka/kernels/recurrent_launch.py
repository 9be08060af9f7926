"""Launches of the kernels that take tokens one after another, in Triton and in CUDA C++."""

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from gka.kernels import recurrent
from gka.kernels.hopper import recurrent as hopper
from gka.maths.recurrent import fresh_states, fresh_x
from gka.maths.ridge import empty_below

if TYPE_CHECKING:
    from gka.maths.chunked import Forward, Settings, Tokens
    from gka.maths.recurrent import States

# How H is held in registers, by its padded width: more warps only where fewer would spill it. 256 columns
# spill whatever the number; all the registers that 16 warps can have spill least.
HELD: dict[int, dict[str, int]] = {
    16: {"num_warps": 1},
    32: {"num_warps": 1},
    64: {"num_warps": 2},
    128: {"num_warps": 4},
    256: {"num_warps": 16, "maxnreg": 128},
}
COLUMNS = 16  # of U at a time


def width(dim: int) -> int:
    """A head dimension as the Triton kernels pad it."""
    return max(16, triton.next_power_of_2(dim))


def flat(x: Tensor | None, gate: bool = False) -> Tensor | None:
    """An input as the kernels read it: neighbouring entries of a head; gates in float32."""
    if x is None:
        return None
    if gate:
        return x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def inputs(tokens: "Tokens", settings: "Settings") -> dict[str, Tensor | None]:
    """q, k, v and the gates by name, one decay given twice where it is tied."""
    t = tokens
    gates = {"g": t.g, "gk": t.g if settings.tied else t.gk, "alpha": t.alpha, "beta": t.beta}
    heads = {name: flat(x) for name, x in (("q", t.q), ("k", t.k), ("v", t.v))}
    return heads | {name: flat(x, gate=True) for name, x in gates.items()}


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, token and head."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def step(
    tokens: "Tokens", settings: "Settings", states: "States", commit: bool = True,
    x: Tensor | None = None, on_hopper: bool = False,
) -> Tensor:  # fmt: skip
    """o [B,T,H,V]: `maths.recurrent.step_` in one launch."""
    batch, length, heads, _ = tokens.q.shape
    o = tokens.q.new_empty(batch, length, heads, tokens.v.shape[-1])
    if o.numel() == 0:
        return o
    if on_hopper:
        hopper.step(inputs(tokens, settings), tokens.cu_seqlens, settings, states, commit, o, x)
    else:
        _triton_step(tokens, settings, states, commit, o, x)
    return o


def _triton_step(
    tokens: "Tokens",
    settings: "Settings",
    states: "States",
    commit: bool,
    o: Tensor,
    x: Tensor | None,
) -> None:
    given = inputs(tokens, settings)
    (batch, length, heads, dim), value_dim = tokens.q.shape, tokens.v.shape[-1]
    bounds = tokens.cu_seqlens
    sequences = batch if bounds is None else bounds.numel() - 1
    # several tokens need U between them: in the pool only if it may change and holds what float32 holds
    apart = length > 1 and not (commit and states.u.dtype == torch.float32)
    shape = (sequences, heads, dim, value_dim)
    work = states.u.new_empty(shape, dtype=torch.float32) if apart else None
    h, block = states.h, width(dim)
    kernel: Any = recurrent.step_kernel
    kernel[(sequences * heads,)](
        *given.values(), h, states.u, work, states.indices, bounds, o, x,
        tuple(strides(y) for y in given.values()), 0 if h is None else h.stride(0), states.u.stride(0),
        settings.scale, settings.ridge_ratio, settings.num_iter, empty_below(torch.float32), length,
        states.u.shape[0], heads, tokens.k.shape[2], tokens.v.shape[2], K=dim, V=value_dim, BK=block,
        BV=min(COLUMNS, width(value_dim)), COMMIT=commit, SOLVE=settings.num_iter > 0,
        ADAPTIVE=settings.solver == "adaptive", **HELD[block],
    )  # fmt: skip


def advance(tokens: "Tokens", settings: "Settings", states: "States", counts: Tensor) -> None:
    """`maths.recurrent.advance_` in one launch."""
    given = inputs(tokens, settings)
    read = [given[name] for name in ("k", "v", "g", "gk", "beta")]
    (batch, length, heads, dim), value_dim = tokens.q.shape, tokens.v.shape[-1]
    h = states.h
    assert h is not None
    rows = 16
    kernel: Any = recurrent.advance_kernel
    kernel[(batch * heads, triton.cdiv(dim, rows))](
        *read, h, states.u, states.indices, counts, tuple(strides(y) for y in read), h.stride(0),
        states.u.stride(0), length, states.u.shape[0], heads, tokens.k.shape[2], tokens.v.shape[2],
        K=dim, V=value_dim, BK=width(dim), BV=width(value_dim), R=rows, num_warps=4,
    )  # fmt: skip


def forward(tokens: "Tokens", settings: "Settings", on_hopper: bool = False) -> "Forward":
    """`maths.recurrent.recurrent_forward` in one launch."""
    from gka.maths.chunked import Forward

    states, x = fresh_states(tokens, settings), fresh_x(tokens, settings)
    o = step(tokens, settings, states, True, x, on_hopper)
    return Forward(o=o, x=x, h=states.h, u=states.u)
