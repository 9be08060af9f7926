"""Launches of the kernels of `gka.kernels.triton.ends`: end states from zero, and their gradients."""

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gka.kernels.surround.launch import launch
from gka.kernels.triton.ends import ends_backward_kernel, ends_kernel
from gka.maths.ends import EndInputs
from gka.maths.grouped import group_sum
from gka.maths.layout import ChunkLayout, chunk_layout
from gka.maths.moments import reset_floor

CHUNK = 64  # tokens
ENOUGH = 1024  # programs that fill any GPU; segments grow beyond them
FLOOR = reset_floor(torch.float32)


@dataclass(frozen=True)
class Places:
    """Chunks and segments of chunks of every sequence.

    Attributes:
        layout: the chunks.
        chunks: each chunk's first token, and its sequence's end, int64 [M,2].
        owner: each chunk's sequence, int64 [M].
        segments: first and end chunk of each, int32 [S,2].
        of_segment: each segment's sequence, int64 [S].
    """

    layout: ChunkLayout
    chunks: Tensor
    owner: Tensor
    segments: Tensor
    of_segment: Tensor


def find_places(
    bounds: tuple[int, ...], layout: ChunkLayout, each: int, device: torch.device
) -> Places:
    """The places of sequences with these bounds in tokens, in segments of at most `each` chunks."""
    chunks, owner, segments, of_segment = [], [], [], []
    spans = zip(itertools.pairwise(bounds), itertools.pairwise(layout.offsets), strict=True)
    for n, ((begin, end), (first, last)) in enumerate(spans):
        chunks += [(row, end) for row in range(begin, end, CHUNK)]
        owner += [n] * (last - first)
        found = [(a, min(a + each, last)) for a in range(first, last, each)]
        segments += found
        of_segment += [n] * len(found)

    def held(rows: list, dtype: torch.dtype, *shape: int) -> Tensor:
        table = torch.tensor(rows, dtype=dtype, device="cpu").view(-1, *shape)
        return table.to(device, non_blocking=True)

    return Places(
        layout, held(chunks, torch.int64, 2), held(owner, torch.int64),
        held(segments, torch.int32, 2), held(of_segment, torch.int64),
    )  # fmt: skip


@lru_cache(maxsize=32)
def _even_places(batch: int, length: int, each: int, device: torch.device) -> Places:
    bounds = tuple(range(0, batch * length + 1, length))
    return find_places(bounds, chunk_layout(batch, length, CHUNK), each, device)


def sizes_of(inputs: EndInputs) -> dict[str, Any]:
    """Compile-time sizes of both kernels."""
    (hk, key_dim), (hv, value_dim) = inputs.k.shape[2:], inputs.v.shape[2:]
    exact = inputs.k.dtype == torch.float32
    widest = max(_block(key_dim), _block(value_dim))
    return {
        "H": inputs.heads, "HK": hk, "HV": hv, "GK": inputs.heads // hk, "GV": inputs.heads // hv,
        "K": key_dim, "V": value_dim, "BK": _block(key_dim), "BN": min(32 if exact else 64, widest),
        "C": CHUNK, "OP": tl.float32 if exact else tl.float16,
        "PREC": "tf32x3" if exact else "tf32",
        "num_warps": 8 if widest > 64 else 4, "num_stages": 2,
    }  # fmt: skip


def places_of(inputs: EndInputs, blocks: int) -> Places:
    """The places, with segments for programs that own one of `blocks` blocks of columns."""
    batch, length = inputs.k.shape[:2]
    each = max(1, batch * -(-length // CHUNK) * inputs.heads * blocks // ENOUGH)
    if inputs.cu_seqlens is None:
        return _even_places(batch, length, each, inputs.k.device)
    bounds = (inputs.cu_seqlens, inputs.cu_seqlens_cpu)
    layout = chunk_layout(batch, length, CHUNK, *bounds)
    known = bounds[0] if bounds[1] is None else bounds[1]
    return find_places(tuple(known.tolist()), layout, each, inputs.k.device)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Ends:
    """What `end_states` found, and what its gradient needs.

    Attributes:
        totals_u, totals_h: total log decays of each sequence, float64 [N,H]; None without decay.
        u: [N,H,K,V]. h: [N,H,K,K], or None.
        after_u, after_h: log decays from each chunk's end, float32 [M,H] or None.
    """

    totals_u: Tensor | None
    totals_h: Tensor | None
    u: Tensor
    h: Tensor | None
    after_u: Tensor | None
    after_h: Tensor | None


def end_states(inputs: EndInputs) -> Ends:
    """U and H at the ends of sequences, from zero, float32."""
    sizes = sizes_of(inputs)
    of_k, of_v = (triton.cdiv(sizes[n], sizes["BN"]) for n in ("K", "V"))
    of_k = of_k if inputs.with_h else 0
    places = places_of(inputs, of_k + of_v)
    totals_u, after_u = _decays(inputs.g, places)
    totals_h, after_h = (totals_u, after_u) if inputs.tied else _decays(inputs.gk, places)
    count, (key_dim, value_dim) = len(places.segments), (sizes["K"], sizes["V"])
    sums_u = _new(inputs.k, count, inputs.heads, key_dim, value_dim)
    sums_h = _new(inputs.k, count, inputs.heads, key_dim, key_dim) if inputs.with_h else None
    g, gk = _gates(inputs)
    args = (
        inputs.k, inputs.v, gk, g, inputs.beta, after_h, after_u, sums_h, sums_u, places.chunks,
        places.segments,
    )  # fmt: skip
    launch(ends_kernel, (count, inputs.heads, of_k + of_v), args, {**sizes, "NK": of_k})
    u, h = (None if x is None else _by_sequence(x, places) for x in (sums_u, sums_h))
    assert u is not None
    return Ends(totals_u, totals_h, u, h, after_u, after_h)


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _gates(inputs: EndInputs) -> tuple[Tensor | None, Tensor | None]:
    return inputs.g, inputs.g if inputs.tied else inputs.gk


def _decays(g: Tensor | None, places: Places) -> tuple[Tensor | None, Tensor | None]:
    """Total log decays of sequences [N,H], and those from each chunk's end [M,H], float32."""
    if g is None:
        return None, None
    chunks = places.layout.cut(g.clamp_min(FLOOR)).sum(1, dtype=torch.float64)
    totals = _by_sequence(chunks, places, chunked=True)
    return totals, (totals[places.owner] - _upto(chunks, places)).float()


def _upto(x: Tensor, places: Places) -> Tensor:
    """Sums of x [M,H] over the chunks of a sequence up to each."""
    layout = places.layout
    if layout.slots is None:
        # along the last dimension, where torch's scan is fast
        heads_first = x.unflatten(0, (layout.batch, -1)).transpose(1, 2).contiguous()
        return heads_first.cumsum(-1).transpose(1, 2).flatten(0, 1)
    sums = x.T.contiguous().cumsum(-1).T
    first = torch.tensor(layout.offsets[:-1], device="cpu").to(x.device, non_blocking=True)
    before = (sums - x)[first.clamp_max(max(layout.num_chunks - 1, 0))]
    return sums - before[places.owner] if len(x) else sums


def _by_sequence(x: Tensor, places: Places, chunked: bool = False) -> Tensor:
    """Sums of segments' (of chunks') rows over each sequence [N,...]."""
    if places.layout.slots is None:
        return x.unflatten(0, (places.layout.batch, -1)).sum(1)
    sums = x.new_zeros(places.layout.num_sequences, *x.shape[1:])
    return sums.index_add_(0, places.owner if chunked else places.of_segment, x)


@dataclass(frozen=True)
class EndGrads:
    """Gradients in the inputs' shapes, in their dtypes or float32; None where the input was None."""

    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    beta: Tensor | None


def end_states_backward(
    inputs: EndInputs,
    after: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    grad_totals: tuple[Tensor | None, Tensor | None],
) -> EndGrads:
    """Gradients of all inputs. Everything is given for U and for H, in this order.

    Args:
        after: `Ends.after_u` and `after_h`.
        grads: of U [N,H,K,V], and of H [N,H,K,K] or None.
        grad_totals: of the total log decays [N,H], or None. Tied: of both in the first.
    """
    sizes, places, k = sizes_of(inputs), places_of(inputs, 1), inputs.k
    exact, (tokens, heads) = k.dtype == torch.float32, (k.shape[:2], inputs.heads)
    (grad_u, scale_u), (grad_h, scale_h) = (_operand(x, exact) for x in _symmetric(grads))
    dk = k.new_empty(*tokens, heads, sizes["K"], dtype=_width(k, heads))
    dv = k.new_empty(*tokens, heads, sizes["V"], dtype=_width(inputs.v, heads))
    untied = inputs.gk is not None and not inputs.tied and grad_h is not None
    dgk = _new(k, *tokens, heads) if untied else None
    dg = None if inputs.g is None else _new(k, *tokens, heads)
    dbeta = None if inputs.beta is None else _new(k, *tokens, heads)
    totals_u, totals_h = (
        None if x is None else _new(k, len(places.chunks), heads) for x in (dg, dgk)
    )
    g, gk = _gates(inputs)
    args = (
        k, inputs.v, gk, g, inputs.beta, after[1], after[0], grad_h, scale_h, grad_u, scale_u, dk, dv,
        dgk, dg, totals_h, totals_u, dbeta, places.chunks, places.owner,
    )  # fmt: skip
    more = {"BV": _block(sizes["V"]), "TIED": inputs.tied}
    launch(ends_backward_kernel, (len(places.chunks), heads), args, {**sizes, **more})
    return EndGrads(
        group_sum(dk.transpose(1, 2), k.shape[2]).transpose(1, 2),
        group_sum(dv.transpose(1, 2), inputs.v.shape[2]).transpose(1, 2),
        _with_earlier(dg, totals_u, grad_totals[0], places),
        _with_earlier(dgk, totals_h, grad_totals[1], places),
        dbeta,
    )


def _width(x: Tensor, heads: int) -> torch.dtype:
    """The dtype of heads' gradients: x's own where none are summed."""
    return x.dtype if x.shape[2] == heads else torch.float32


def _symmetric(grads: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    grad_u, grad_h = grads
    return grad_u, None if grad_h is None else grad_h + grad_h.transpose(-1, -2)


def _operand(grad: Tensor | None, exact: bool) -> tuple[Tensor | None, Tensor | None]:
    """A gradient over its largest entry in the tensor cores' dtype, and that entry [N,H]."""
    if grad is None:
        return None, None
    largest = grad.abs().amax((-1, -2)).float()
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = grad / largest[..., None, None]
    return scaled.to(torch.float32 if exact else torch.float16).contiguous(), largest


def _with_earlier(
    within: Tensor | None, totals: Tensor | None, grad_total: Tensor | None, places: Places
) -> Tensor | None:
    """A decay's gradient: sums within chunks, and of the sequence's earlier chunks; the total's own."""
    if within is None or totals is None:
        return None
    wide = totals.double()
    before = _upto(wide, places) - wide
    if grad_total is not None:
        before = before + grad_total.double()[places.owner]
    layout = places.layout
    spread = before.float().unsqueeze(1).expand(-1, CHUNK, -1)
    if layout.slots is None and layout.places == layout.length:
        within.view(spread.shape).add_(spread)
        return within
    return within.add_(layout.join(spread))
