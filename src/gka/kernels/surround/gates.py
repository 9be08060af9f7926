"""The gates of every token and head, forward and backward, in float32.

beta = sigmoid(b) + eps,  alpha = sigmoid(a'),  g = -exp(A_log) softplus(a + dt_bias)
"""

import triton
import triton.language as tl

# its exp is 0, and its products with a gradient stay finite
LEAST_DECAY: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate for tiny values too."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    # log(1 + u) = u log(w) / (w - 1) with w = 1 + u rounded: its rounding error cancels (Kahan)
    rounded = above - 1.0
    log1p = tl.where(
        rounded == 0.0, small, tl.log(above) * (small / tl.where(rounded == 0.0, 1.0, rounded))
    )
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def decay_rate(A_log, dt_bias):
    """-exp(A_log) and the shift of a, which takes A_log's excess over 60 (gka.layers.parts.modules)."""
    beyond = tl.where(A_log > 60.0, tl.minimum(A_log, 1e30) - 60.0, 0.0)
    return -tl.exp(tl.where(A_log > 60.0, 60.0, A_log)), dt_bias + beyond


@triton.jit
def load_wide(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write_gates(
    b, a2, a, A_log, dt_bias, beta, alpha, g, offsets, mask, heads, exists, inside, eps: tl.constexpr
):  # fmt: skip
    """Write the gates at the offsets [R,BH] of [tokens,H]; g is zero where `inside` [R,1] is false."""
    if b is not None:
        tl.store(beta + offsets, sigmoid(load_wide(b, offsets, mask)) + eps, mask=mask)
    if a2 is not None:
        tl.store(alpha + offsets, sigmoid(load_wide(a2, offsets, mask)), mask=mask)
    if a is not None:
        rate, shift = decay_rate(load_wide(A_log, heads, exists), load_wide(dt_bias, heads, exists))
        decay = rate[None, :] * softplus(load_wide(a, offsets, mask) + shift[None, :])
        decay = tl.where(decay < LEAST_DECAY, LEAST_DECAY, decay)
        tl.store(g + offsets, tl.where(inside, decay, 0.0), mask=mask)


@triton.jit(do_not_specialize=["tokens", "T"])
def gates_kernel(
    b, a2, a, A_log, dt_bias, beta, alpha, g, lengths, tokens, T,
    H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, eps: tl.constexpr,
):  # fmt: skip
    """beta, alpha and g of BT tokens; a gate whose pre-activation is None is skipped.

    Args:
        b, a2, a: pre-activations [tokens,H] of beta, alpha and g.
        A_log, dt_bias: [H].
        beta, alpha, g: [tokens,H] float32.
        lengths: tokens of each row [B]; later g are zero. None: all tokens count. T: row length.
    """
    heads = tl.arange(0, BH)
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = heads < H
    mask = (rows < tokens)[:, None] & exists[None, :]
    offsets = rows[:, None] * H + heads[None, :]
    inside = mask
    if lengths is not None:
        length = tl.load(lengths + rows // T, mask=rows < tokens, other=0)
        inside = (rows % T < length)[:, None] & mask
    write_gates(b, a2, a, A_log, dt_bias, beta, alpha, g, offsets, mask, heads, exists, inside, eps)


@triton.jit
def through_sigmoid(x, dy, dx, offsets, mask):
    """dx = dy s (1 - s), s = sigmoid(x)."""
    s = sigmoid(load_wide(x, offsets, mask))
    grad = load_wide(dy, offsets, mask) * s * (1.0 - s)
    tl.store(dx + offsets, grad.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "T"])
def gates_backward_kernel(
    b, a2, a, A_log, dt_bias, dbeta, dalpha, dg, db, da2, da, partial, lengths, tokens, T,
    H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of the pre-activations, and the part of BT tokens in those of A_log and dt_bias.

    Args:
        partial: [programs,2,H] float32, to be summed over programs.
    """
    heads = tl.arange(0, BH)
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = heads < H
    mask = (rows < tokens)[:, None] & exists[None, :]
    offsets = rows[:, None] * H + heads[None, :]
    if b is not None:
        through_sigmoid(b, dbeta, db, offsets, mask)
    if a2 is not None:
        through_sigmoid(a2, dalpha, da2, offsets, mask)
    if a is not None:
        inside = mask
        if lengths is not None:
            length = tl.load(lengths + rows // T, mask=rows < tokens, other=0)
            inside = (rows % T < length)[:, None] & mask
        rate, shift = decay_rate(load_wide(A_log, heads, exists), load_wide(dt_bias, heads, exists))
        rate = rate[None, :]
        x = load_wide(a, offsets, mask) + shift[None, :]
        grad = load_wide(dg, offsets, inside)
        grad = tl.where(rate * softplus(x) < LEAST_DECAY, 0.0, grad)
        through = grad * rate * sigmoid(x)
        tl.store(da + offsets, through.to(da.dtype.element_ty), mask=mask)
        to = partial + tl.program_id(0).to(tl.int64) * (2 * H) + heads
        # dg / dA_log = g
        tl.store(to, tl.sum(tl.where(mask, grad * rate * softplus(x), 0.0), 0), mask=exists)
        tl.store(to + H, tl.sum(tl.where(mask, through, 0.0), 0), mask=exists)
