"""Launches of the kernels around the op in a layer: convolutions, gates, norm, and the step in decoding.

Each kernel is compiled once per kind of arguments and kept, as in `gka.kernels.triton.plan`.
"""

# Triton declares a launch without its launch options.
# pyright: reportArgumentType=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from gka.kernels.surround.convolution import convolution_backward_kernel, convolution_kernel
from gka.kernels.surround.gated_norm import gated_norm_backward_kernel, gated_norm_kernel
from gka.kernels.surround.gates import gates_backward_kernel, gates_kernel
from gka.kernels.surround.step import step_kernel
from gka.kernels.triton.plan import Launcher

TILE = 128  # channels of a tile of values, which have no norm per head
ENOUGH = 1024  # programs that fill any GPU; segments grow only beyond them
NORM_PROGRAMS = 1024  # programs of the norm's gradient, whose parts of dw are summed
UNROLL = 4  # steps per iteration of the convolution's gradient
AHEAD = 4  # tokens that the convolution's gradient loads ahead

_launchers: dict[tuple, Launcher] = {}
Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def launch(kernel, grid: int | tuple[int, ...], args: tuple, sizes: dict[str, Any]) -> None:
    """Launch `kernel` on tensors, None and integers below 2^31, with compile-time `sizes`.

    The compiled code depends on which arguments are None, on dtypes and on alignment to 16 bytes. The
    kernels do not specialise on their integers.
    """
    kinds = [
        (x.dtype, x.device, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x is None
        for x in args
    ]
    key = (kernel, *kinds, *sizes.values())
    held = _launchers.get(key)
    if held is None:
        held = _launchers[key] = Launcher(kernel, sizes)
    held(grid if isinstance(grid, tuple) else (grid,), *args)


@dataclass(frozen=True)
class Parts:
    """Queries, keys and values [B,T,C] to be convolved, with weights [C,1,W] and states [B,C,W].

    Attributes:
        x, weights, states: of q, k and v. Those of v are None if values are not convolved; a state is
            None if there is no past.
        past: tokens before each in its packed sequence, at most W - 1, uint8 [T], or None.
        lengths: tokens of each row [B], or None; later keys are zero.
        head_dim: K.
    """

    x: Three
    weights: Three
    states: Three
    past: Tensor | None
    lengths: Tensor | None
    head_dim: int

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        q = self.x[0]
        assert q is not None
        return q.shape[0], q.shape[1]

    @property
    def width(self) -> int:
        w = self.weights[0]
        assert w is not None
        return w.shape[-1]

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(0 if x is None else x.shape[-1] for x in self.x)

    def sizes(self) -> dict[str, int]:
        """Compile-time sizes of both passes."""
        (cq, ck, cv), dk = self.channels, self.head_dim
        dv = min(TILE, max(cv, 1))
        blocks = {"BK": _block(dk), "BV": _block(dv)}
        return {"CQ": cq, "CK": ck, "CV": cv, "DK": dk, "DV": dv, "W": self.width, **blocks}

    def tiles(self, sizes: dict[str, int]) -> int:
        heads = (sizes["CQ"] + sizes["CK"]) // sizes["DK"]
        return heads + triton.cdiv(sizes["CV"], sizes["DV"])


def _block(size: int) -> int:
    return max(8, triton.next_power_of_2(size))


def convolve(parts: Parts) -> Three:
    """Unit queries, unit keys and values, in the dtypes of the inputs."""
    sizes, (batch, tokens) = parts.sizes(), parts.shape
    block = min(128, 4096 // max(sizes["BK"], sizes["BV"]))
    blocks = triton.cdiv(tokens, block)
    out = _like(parts.x)
    args = (
        *parts.x, *parts.weights, *parts.states, *out, parts.past, parts.lengths,
        tokens, blocks,
    )  # fmt: skip
    grid = parts.tiles(sizes) * batch * blocks
    launch(convolution_kernel, grid, args, {**sizes, "BT": block, "num_warps": 8})
    return out


def _like(tensors: Three) -> Three:
    q, k, v = (None if x is None else torch.empty_like(x) for x in tensors)
    return q, k, v


def segment_length(tokens: int, tiles: int, segments: int) -> int:
    """Tokens of a segment: the longest that leaves enough programs, as each segment rereads W - 1 tokens."""
    for length in (256, 128, 64, 32):
        if tokens * tiles >= ENOUGH * segments * length:
            return length
    return 16


def convolve_backward(
    parts: Parts, dout: Three, with_x: bool, with_weights: bool
) -> tuple[Three, Three]:
    """Gradients of the inputs and of the weights; None where not wanted."""
    sizes, (batch, tokens) = parts.sizes(), parts.shape
    elements = 1024 if parts.width <= 4 else 512  # of a tile that fits the registers
    rows = {"RK": _rows(elements, sizes["BK"]), "RV": _rows(elements, sizes["BV"])}
    if not sizes["CV"]:
        rows["RV"] = rows["RK"]
    segments, tiles = max(rows.values()), parts.tiles(sizes)
    length = segment_length(batch * tokens, tiles, segments)
    blocks = triton.cdiv(tokens, length * segments)
    places, channels = batch * blocks, sum(parts.channels)
    dx: Three = _like(parts.x) if with_x else (None, None, None)
    partial = None
    if with_weights:
        shape = (places, channels, parts.width)
        partial = torch.empty(shape, device=dout[0].device, dtype=torch.float32)  # pyright: ignore[reportOptionalMemberAccess]
    args = (
        *parts.x, *parts.weights, *parts.states, *dout, *dx, partial, parts.past, parts.lengths,
        tokens, length, blocks,
    )  # fmt: skip
    more = {**rows, "SEGMENTS": segments, "AHEAD": AHEAD, "UNROLL": UNROLL, "num_warps": 4}
    launch(convolution_backward_kernel, tiles * places, args, {**sizes, **more})
    return dx, _weight_gradients(partial, parts)


def _rows(elements: int, block: int) -> int:
    return max(1, min(32, elements // block))


def _weight_gradients(partial: Tensor | None, parts: Parts) -> Three:
    if partial is None:
        return None, None, None
    split = partial.sum(0).split(parts.channels)
    q, k, v = (
        None if w is None else grad.view(w.shape).to(w.dtype)
        for grad, w in zip(split, parts.weights, strict=True)
    )
    return q, k, v


@dataclass(frozen=True)
class GateInputs:
    """Pre-activations [B,T,H] of beta, alpha and g; None for an absent gate.

    Attributes:
        A_log, dt_bias: [H]; given with a.
        lengths: tokens of each row [B], or None; later g are zero.
        eps: added to beta.
    """

    b: Tensor | None
    a2: Tensor | None
    a: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    lengths: Tensor | None
    eps: float

    @property
    def inputs(self) -> Three:
        return self.b, self.a2, self.a

    @property
    def any(self) -> Tensor:
        """The first pre-activation that is given."""
        return next(x for x in self.inputs if x is not None)

    def sizes(self) -> dict[str, Any]:
        heads = self.any.shape[-1]
        block = triton.next_power_of_2(heads)
        return {"H": heads, "BH": block, "BT": max(1, 1024 // block)}


def gates(given: GateInputs) -> Three:
    """beta, alpha and g, float32."""
    sizes, some = given.sizes(), given.any
    batch, length = some.shape[:2]
    beta, alpha, g = (
        None if x is None else torch.empty_like(x, dtype=torch.float32) for x in given.inputs
    )
    args = (
        *given.inputs, given.A_log, given.dt_bias, beta, alpha, g, given.lengths,
        batch * length, length,
    )  # fmt: skip
    grid = triton.cdiv(batch * length, sizes["BT"])
    launch(gates_kernel, grid, args, {**sizes, "eps": given.eps, "num_warps": 4})
    return beta, alpha, g


def gates_backward(given: GateInputs, grads: Three) -> tuple[Three, Tensor | None, Tensor | None]:
    """Gradients of the pre-activations, of A_log and of dt_bias."""
    sizes, some = given.sizes(), given.any
    batch, length = some.shape[:2]
    programs = triton.cdiv(batch * length, sizes["BT"])
    partial = None
    if given.a is not None:
        partial = torch.empty(programs, 2, sizes["H"], device=some.device, dtype=torch.float32)
    out = _like(given.inputs)
    args = (
        *given.inputs, given.A_log, given.dt_bias, *grads, *out, partial, given.lengths,
        batch * length, length,
    )  # fmt: skip
    launch(gates_backward_kernel, programs, args, {**sizes, "num_warps": 4})
    if partial is None or given.A_log is None or given.dt_bias is None:
        return out, None, None
    rate, shift = partial.sum(0)
    return out, rate.to(given.A_log.dtype), shift.to(given.dt_bias.dtype)


def step(parts: Parts, given: GateInputs) -> tuple[Three, Three]:
    """q, k, v and beta, alpha, g of a few tokens; the states of `parts` are updated in place."""
    sizes, (batch, tokens) = parts.sizes(), parts.shape
    heads = next((x.shape[-1] for x in given.inputs if x is not None), 0)
    out = _like(parts.x)
    beta, alpha, g = (
        None if x is None else torch.empty_like(x, dtype=torch.float32) for x in given.inputs
    )
    args = (
        *parts.x, *parts.weights, *parts.states, *out,
        *given.inputs, given.A_log, given.dt_bias, beta, alpha, g, parts.lengths, tokens,
    )  # fmt: skip
    more = {
        "H": heads, "BH": triton.next_power_of_2(max(heads, 1)),
        "BT": triton.next_power_of_2(tokens), "eps": given.eps, "num_warps": 1,
    }  # fmt: skip
    grid = batch * (parts.tiles(sizes) + (heads > 0))
    launch(step_kernel, grid, args, {**sizes, **more})
    return out, (beta, alpha, g)


def _norm_sizes(x: Tensor, eps: float) -> dict[str, Any]:
    block = _block(x.shape[-1])
    return {"eps": eps, "V": x.shape[-1], "BR": max(1, min(64, 2048 // block)), "BV": block}


def gated_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x, times SiLU of the gate of as many elements."""
    sizes = _norm_sizes(x, eps)
    rows, out = x.numel() // x.shape[-1], torch.empty_like(x)
    grid = triton.cdiv(rows, sizes["BR"])
    launch(gated_norm_kernel, grid, (x, gate, weight, out, rows), {**sizes, "num_warps": 4})
    return out


def gated_norm_backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of the gate and of the weight."""
    sizes = _norm_sizes(x, eps)
    rows = x.numel() // x.shape[-1]
    blocks = triton.cdiv(rows, sizes["BR"])
    each = triton.cdiv(blocks, NORM_PROGRAMS)
    programs = triton.cdiv(blocks, each)
    dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
    partial = torch.empty(programs, x.shape[-1], device=x.device, dtype=torch.float32)
    args = (x, gate, weight, dout, dx, dgate, partial, rows, each)
    launch(gated_norm_backward_kernel, programs, args, {**sizes, "num_warps": 4})
    return dx, dgate, partial.sum(0).to(weight.dtype)
