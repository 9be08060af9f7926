"""Scans over chunks backwards: the gradients of H and U at chunk ends."""

import triton
import triton.language as tl

from gka.kernels.common import load_gate, load_mix, load_rows, operand


@triton.jit
def scaled_outer(left, right, weight, OP: tl.constexpr, PREC: tl.constexpr):
    """sum_t w_t left_t right_t^T with operands scaled to at most one."""
    ln, l_max = operand(left, OP)
    rn, r_max = operand(right * weight[:, None], OP)
    return tl.dot(tl.trans(ln), rn, input_precision=PREC) * (l_max * r_max)


@triton.jit
def moments_reverse_kernel(
    q,  # [tokens, H, K]: U: with x and alpha it gives z; H: None
    x,  # [tokens, H, K] or None
    alpha,  # [tokens, H] or None
    d,  # [tokens, H, V]: U: do; H: y
    k,  # [tokens, HK, K] with ridge terms, else None
    key_weight,  # [tokens, H]: sum_t zeta_t w_t W_tj; with ridge terms
    start_weight,  # [M, H]: sum_t zeta_t^2 w_t; with ridge terms
    states,  # [M, H, K, V] H_[c] / scale; with ridge terms
    scales,  # [M, H, NV]
    g,  # [tokens, H] or None
    final,  # [N, H, K, V] float32 or None: gradient of the final state
    ends,  # [M, H, K, V]: gradient of the state at each chunk's end
    initial,  # [N, H, K, V] float32: gradient of the initial state
    bounds,
    first_chunk,
    factor,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    RIDGE: tl.constexpr,
    LOCAL: tl.constexpr,  # chunks contribute (else only the final state's gradient decays)
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    n, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    places = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = block * BV + tl.arange(0, BV)
    tile = rk[:, None] * V + rv[None, :]
    inside = (rk[:, None] < K) & (rv[None, :] < V)
    grad = tl.zeros((BK, BV), tl.float32)
    if final is not None:
        grad = tl.load(final + (n * H + h) * K * V + tile, mask=inside, other=0.0)
    first = tl.load(first_chunk + n)
    last = tl.load(first_chunk + n + 1)
    begin, length = tl.load(bounds + n), tl.load(bounds + n + 1) - tl.load(bounds + n)
    for i in range(first, last):
        c = first + last - 1 - i
        ch = c * H + h
        tl.store(ends + ch * K * V + tile, grad.to(ends.dtype.element_ty), mask=inside)
        row = begin + (c - first) * C + places
        valid = (c - first) * C + places < length
        gate = load_gate(g, row, H, h, valid, 0.0)
        zeta = tl.exp(tl.cumsum(gate, 0))
        grad = grad * tl.exp(tl.sum(gate, 0))
        if LOCAL:
            right = load_rows(d, row, H, h, V, rv, valid)
            if RIDGE:
                # -1/2 (y x^T + x y^T), and the path through lambda
                left = load_rows(x, row, H, h, K, rk, valid)
                local = scaled_outer(left, right, zeta, OP, PREC)
                left = load_rows(d, row, H, h, K, rk, valid)
                right = load_rows(x, row, H, h, V, rv, valid)
                local += scaled_outer(left, right, zeta, OP, PREC)
                left = load_rows(k, row, HK, h // GK, K, rk, valid)
                right = load_rows(k, row, HK, h // GK, V, rv, valid)
                weight = load_gate(key_weight, row, H, h, valid, 0.0)
                local += scaled_outer(left, right, weight, OP, PREC)
                stored = tl.load(states + ch * K * V + tile, mask=inside, other=0.0)
                stored_scale = tl.load(scales + ch * blocks + block)
                local += stored.to(tl.float32) * (stored_scale * tl.load(start_weight + ch))
            else:
                left = load_mix(q, x, alpha, row, H, h, K, rk, valid)
                local = scaled_outer(left, right, zeta, OP, PREC)
            grad += factor * local
    tl.store(initial + (n * H + h) * K * V + tile, grad, mask=inside)
