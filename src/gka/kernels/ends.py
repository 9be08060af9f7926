"""Launches of the kernels of `gka.kernels.triton.ends`: end states from zero, and their gradients."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gka.kernels.surround.launch import launch
from gka.kernels.tables import SCAN_PROGRAMS, Chunking, chunking
from gka.kernels.triton.ends import ends_backward_kernel, ends_kernel
from gka.maths.chunked import Tokens
from gka.maths.ends import EndGradients, EndInputs
from gka.maths.grouped import group_sum
from gka.maths.layout import ChunkLayout, chunk_layout
from gka.maths.moments import reset_floor

CHUNK = 64  # tokens
ENOUGH = 1024  # programs that fill any GPU; segments grow beyond them
FLOOR = reset_floor(torch.float32)


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


def chunks_of(inputs: EndInputs, blocks: int) -> tuple[ChunkLayout, Chunking]:
    """The chunks, and their tables with segments for programs that own one of `blocks` blocks of columns."""
    k, bounds = inputs.k, (inputs.cu_seqlens, inputs.cu_seqlens_cpu)
    layout = chunk_layout(k.shape[0], k.shape[1], CHUNK, *bounds)
    tokens = Tokens(k, k, inputs.v, None, None, None, None, None, None, *bounds)
    programs = max(1, inputs.heads * blocks * SCAN_PROGRAMS // ENOUGH)
    return layout, chunking(tokens, CHUNK, programs)


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
    layout, tables = chunks_of(inputs, of_k + of_v)
    owner = layout.owners(inputs.k.device)
    totals_u, after_u = _decays(inputs.g, layout, owner)
    totals_h, after_h = (totals_u, after_u) if inputs.tied else _decays(inputs.gk, layout, owner)
    count, (key_dim, value_dim) = tables.num_segments, (sizes["K"], sizes["V"])
    sums_u = _new(inputs.k, count, inputs.heads, key_dim, value_dim)
    sums_h = _new(inputs.k, count, inputs.heads, key_dim, key_dim) if inputs.with_h else None
    g, gk = _gates(inputs)
    args = (
        inputs.k, inputs.v, gk, g, inputs.beta, after_h, after_u, sums_h, sums_u, tables.start,
        tables.length, tables.segments,
    )  # fmt: skip
    launch(ends_kernel, (count, inputs.heads, of_k + of_v), args, {**sizes, "NK": of_k})
    of_segment = tables.segments[:, 0].long()
    u, h = (None if x is None else layout.sums(x, of_segment) for x in (sums_u, sums_h))
    assert u is not None
    return Ends(totals_u, totals_h, u, h, after_u, after_h)


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _gates(inputs: EndInputs) -> tuple[Tensor | None, Tensor | None]:
    return inputs.g, inputs.g if inputs.tied else inputs.gk


def _decays(
    g: Tensor | None, layout: ChunkLayout, owner: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Total log decays of sequences [N,H], and those from each chunk's end [M,H], float32."""
    if g is None:
        return None, None
    chunks = layout.cut(g.clamp_min(FLOOR)).sum(1, dtype=torch.float64)
    totals = layout.sums(chunks, owner)
    return totals, (totals[owner] - layout.earlier(chunks, owner) - chunks).float()


def end_states_backward(
    inputs: EndInputs,
    after: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    grad_totals: tuple[Tensor | None, Tensor | None],
) -> EndGradients:
    """Gradients of all inputs, in their dtypes or float32. Pairs are given for U and H, in this order.

    Args:
        after: `Ends.after_u` and `after_h`.
        grads: of U [N,H,K,V], and of H [N,H,K,K] or None.
        grad_totals: of the total log decays [N,H], or None. Tied: of both in the first.
    """
    sizes, k = sizes_of(inputs), inputs.k
    layout, tables = chunks_of(inputs, 1)
    owner = layout.owners(k.device)
    exact, (tokens, heads) = k.dtype == torch.float32, (k.shape[:2], inputs.heads)
    (grad_u, scale_u), (grad_h, scale_h) = (_operand(x, exact) for x in _symmetric(grads))
    dk = k.new_empty(*tokens, heads, sizes["K"], dtype=_width(k, heads))
    dv = k.new_empty(*tokens, heads, sizes["V"], dtype=_width(inputs.v, heads))
    untied = inputs.gk is not None and not inputs.tied and grad_h is not None
    dgk = _new(k, *tokens, heads) if untied else None
    dg = None if inputs.g is None else _new(k, *tokens, heads)
    dbeta = None if inputs.beta is None else _new(k, *tokens, heads)
    totals_u, totals_h = (
        None if x is None else _new(k, tables.num_chunks, heads) for x in (dg, dgk)
    )
    g, gk = _gates(inputs)
    args = (
        k, inputs.v, gk, g, inputs.beta, after[1], after[0], grad_h, scale_h, grad_u, scale_u, dk, dv,
        dgk, dg, totals_h, totals_u, dbeta, tables.start, tables.length, owner,
    )  # fmt: skip
    more = {"BV": _block(sizes["V"]), "TIED": inputs.tied}
    if tables.num_chunks > 0:
        launch(ends_backward_kernel, (tables.num_chunks, heads), args, {**sizes, **more})
    return EndGradients(
        k=group_sum(dk.transpose(1, 2), k.shape[2]).transpose(1, 2),
        v=group_sum(dv.transpose(1, 2), inputs.v.shape[2]).transpose(1, 2),
        g=_with_earlier(dg, totals_u, grad_totals[0], layout, owner),
        beta=dbeta,
        gk=_with_earlier(dgk, totals_h, grad_totals[1], layout, owner),
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
    within: Tensor | None, totals: Tensor | None, grad_total: Tensor | None, layout: ChunkLayout,
    owner: Tensor,
) -> Tensor | None:  # fmt: skip
    """A decay's gradient: sums within chunks, and of the sequence's earlier chunks; the total's own."""
    if within is None or totals is None:
        return None
    before = layout.earlier(totals.double(), owner)
    if grad_total is not None:
        before = before + grad_total.double()[owner]
    spread = before.float().unsqueeze(1).expand(-1, CHUNK, -1)
    if layout.slots is None and layout.places == layout.length:
        within.view(spread.shape).add_(spread)
        return within
    return within.add_(layout.join(spread))
