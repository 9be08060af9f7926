"""RMSNorm of each head, times SiLU of a gate if given, forward and backward.

y = w x r SiLU(gate),  r = 1 / sqrt(mean(x^2) + eps)
"""

import triton
import triton.language as tl

from gka.kernels.surround.convolution import silu
from gka.kernels.triton.common import divides


@triton.jit
def row_offsets(block, rows, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """Start (int64), offsets and mask of BR rows of a [rows,V] array."""
    at, cols = tl.arange(0, BR), tl.arange(0, BV)
    start = block.to(tl.int64) * (BR * V)
    mask = (block * BR + at < rows)[:, None]
    if not divides(BV, V):
        mask = mask & (cols[None, :] < V)
    return start, at[:, None] * V + cols[None, :], mask


@triton.jit
def load_weight(w, V: tl.constexpr, BV: tl.constexpr):
    cols = tl.arange(0, BV)
    return tl.load(w + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def gated_norm_kernel(
    x, gate, w, y, rows, eps: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """y of BR rows. x, gate (or None), y: [rows,V]; w: [V]."""
    start, offsets, mask = row_offsets(tl.program_id(0), rows, V, BR, BV)
    value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, 1) / V + eps)
    out = value * r[:, None] * load_weight(w, V, BV)
    if gate is not None:
        factor, _ = silu(tl.load(gate + start + offsets, mask=mask, other=0.0).to(tl.float32))
        out *= factor
    tl.store(y + start + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "each"])
def gated_norm_backward_kernel(
    x, gate, w, dy, dx, dgate, partial, rows, each,
    eps: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of x and gate for `each` blocks of BR rows, and their part of dw.

    Args:
        partial: [programs,V] float32, to be summed over programs.
    """
    program = tl.program_id(0)
    weight = load_weight(w, V, BV)
    sums = tl.zeros((BR, BV), tl.float32)
    for i in range(each):
        block = program * each + i
        start, offsets, mask = row_offsets(block, rows, V, BR, BV)
        value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dy + start + offsets, mask=mask, other=0.0).to(tl.float32)
        r = (1.0 / tl.sqrt(tl.sum(value * value, 1) / V + eps))[:, None]
        normal = value * r
        if gate is not None:
            z = tl.load(gate + start + offsets, mask=mask, other=0.0).to(tl.float32)
            factor, slope = silu(z)
            through = dout * weight * normal * slope
            tl.store(dgate + start + offsets, through.to(dgate.dtype.element_ty), mask=mask)
            dout *= factor
        sums += dout * normal
        dnormal = dout * weight
        dvalue = r * (dnormal - normal * (tl.sum(dnormal * normal, 1) / V)[:, None])
        tl.store(dx + start + offsets, dvalue.to(dx.dtype.element_ty), mask=mask)
    cols = tl.arange(0, BV)
    tl.store(partial + program.to(tl.int64) * V + cols, tl.sum(sums, 0), mask=cols < V)
