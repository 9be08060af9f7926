"""Scans over chunks backwards: the gradients E of H and U at chunk ends, in the segments of `scan`.

H is symmetric, so its gradient is (E + E^T) / 2. The scan keeps E unsymmetrised, which takes one product
of y and x instead of two. Stored E are divided by a running bound, as the moments are.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import (
    cumulative_decays,
    inverse,
    load_decay,
    load_gate,
    load_mix,
    load_raw,
    load_state,
    row_maxima,
    shares,
    store_state,
)
from gka.kernels.triton.scan import earlier, segment_of, unit_of


@triton.jit
def hand_back_u(
    grad, bound, whole, zeta, q, x, x_scale, alpha, do, row, valid, h, rk, rv, H, factor,
    K: tl.constexpr, V: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """E <- E whole + factor sum_t zeta_t z_t do_t^T; returns E, its bound, max|z|, max|do|."""
    z = load_mix(q, x, x_scale, alpha, row, H, h, K, rk, valid)
    right = load_raw(do, row, H, h, V, rv, valid)
    z_max, d_max = row_maxima(z), row_maxima(right)
    weight = factor * zeta * z_max
    largest = tl.sum(tl.abs(weight) * d_max, 0)
    unit = unit_of(largest, bound, whole)
    zn = (z * inverse(z_max)[:, None]).to(OP)
    dn = (right.to(tl.float32) * (weight / unit)[:, None]).to(OP)
    grad = tl.dot(tl.trans(zn), dn, grad * (whole / unit), input_precision=PREC) * unit
    return grad, bound * whole + largest, tl.max(z_max, 0), tl.max(d_max, 0)


@triton.jit
def hand_back_h(
    grad, bound, whole, zeta, x, x_scale, y, y_scale, k, k_max, key_weight, start_weight, stored,
    row, valid, h, j, rk, rv, H, G, HK: tl.constexpr, GK: tl.constexpr, K: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """E <- E whole - sum_t zeta_t y_t x_t^T - (K^T diag(key_weight) K + start_weight H_[c]) / 2.

    K holds the keys k_j / s_j, and H_[c] is the stored one (divided by its scale).
    """
    both = (
        zeta * load_gate(x_scale, row, H, h, valid, 0.0) * load_gate(y_scale, row, G, j, valid, 0.0)
    )
    of_keys = 0.5 * load_gate(key_weight, row, G, j, valid, 0.0)
    of_start = 0.5 * start_weight
    largest = tl.sum(both + tl.abs(of_keys), 0) + tl.abs(of_start)
    unit = unit_of(largest, bound, whole)
    grad = grad * (whole / unit) - stored.to(tl.float32) * (of_start / unit)
    left = load_raw(y, row, G, j, K, rk, valid)
    right = load_raw(x, row, H, h, K, rv, valid).to(tl.float32) * (-both / unit)[:, None]
    grad = tl.dot(tl.trans(left), right.to(OP), grad, input_precision=PREC)
    raw = load_raw(k, row, HK, h // GK, K, rk, valid)
    _share, power = shares(row_maxima(raw), k_max)
    less = (power * inverse(k_max))[:, None]
    left = raw.to(tl.float32) * less
    right = load_raw(k, row, HK, h // GK, K, rv, valid).to(tl.float32) * less
    right = (right * (-of_keys / unit)[:, None]).to(OP)
    grad = tl.dot(tl.trans(left.to(OP)), right, grad, input_precision=PREC) * unit
    return grad, bound * whole + largest


@triton.jit
def reverse_u_kernel(
    q,  # [tokens, H, K]
    x,  # [tokens, H, K] or None: rows divided by x_scale
    x_scale,  # [tokens, H] float32, with x
    alpha,  # [tokens, H] or None
    do,  # [tokens, H, V]
    g,  # [tokens, H] or None
    states,  # [M, G, K, V]: U_[c] / scale
    scales,  # [M, G, NV]
    final,  # [N, H, K, V] float32 or None: gradient of the final state
    final_scale,  # [N, H] float32: largest entry of final; with it
    ends,  # [M, G, K, V] OP: E / end_scale
    end_scales,  # [M, G, NV] float32
    wholes,  # [M, G, NV] float32: decay over the chunk times <S_[c], E>, of the block's columns
    z_maxima,  # [M, G] float32: max |z| of the chunk
    d_maxima,  # [M, G, NV] float32: max |do|
    initial,  # [N, H, K, V] float32 or None: gradient of the initial state
    sums,  # [S, G, K, V] float32: E that each segment adds; None where every sequence is one segment
    sum_scales,
    sum_decays,
    segments,
    bounds,
    chunk_start,
    factor,
    base,
    G,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,  # write `sums` alone
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    segment, j = tl.program_id(0) // G, (tl.program_id(0) % G).to(tl.int64)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    n, first, end, before, after, begin, stop = segment_of(segments, bounds, chunk_start, segment)
    h = base + j
    places = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = block * BV + tl.arange(0, BV)
    grad = tl.zeros((BK, BV), tl.float32)
    bound, decay = 0.0, 0.0
    if SUM:
        if segment == before:  # no segment receives the first one's sum
            end = first
    else:
        if final is not None:
            grad = load_state(final + (n * H + h) * K * V, rk, rv, K, V)
            bound = tl.load(final_scale + n * H + h)
        if sums is not None:
            for i in range(segment + 1, after):
                s = segment + after - i
                grad, bound = earlier(
                    grad, bound, sums, sum_scales, sum_decays, s, j, G, rk, rv, block, blocks, K, V
                )  # fmt: skip
    for i in range(first, end):
        c = first + end - 1 - i
        at = c * G + j
        row = begin + (c - first) * C
        valid = row + places < stop
        gate = load_decay(g, row, H, h, valid)
        total = tl.sum(gate, 0)
        coarse, fine = cumulative_decays(gate)
        zeta, whole = tl.exp(coarse + fine), tl.exp(total)
        if not SUM:
            store_state(ends + at * K * V, grad * inverse(bound), rk, rv, K, V)
            tl.store(end_scales + at * blocks + block, bound)
            stored = load_state(states + at * K * V, rk, rv, K, V).to(tl.float32)
            inner = tl.sum(tl.sum(stored * grad, 1), 0) * tl.load(scales + at * blocks + block)
            tl.store(wholes + at * blocks + block, inner * whole)
        grad, bound, z_max, d_max = hand_back_u(
            grad, bound, whole, zeta, q, x, x_scale, alpha, do, row, valid, h, rk, rv, H, factor,
            K, V, OP, PREC,
        )  # fmt: skip
        decay += total
        if not SUM:
            tl.store(z_maxima + at, z_max, mask=block == 0)
            tl.store(d_maxima + at * blocks + block, d_max)
    if SUM:
        at = segment * G + j
        if segment > before:
            store_state(sums + at * K * V, grad, rk, rv, K, V)
            tl.store(sum_scales + at * blocks + block, bound)
            tl.store(sum_decays + at * blocks + block, decay)
    if initial is not None and not SUM:  # noqa: SIM102 - the compiler's condition, then the program's
        if segment == before:
            store_state(initial + (n * H + h) * K * V, grad, rk, rv, K, V)


@triton.jit
def reverse_h_kernel(
    x,  # [tokens, H, K] or None without a solve: then E only decays
    x_scale,  # [tokens, H]
    y,  # [tokens, G, K]: rows divided by y_scale
    y_scale,  # [tokens, G]
    k,  # [tokens, HK, K]
    k_maxima,  # [M, G]: max |k| of the chunk
    key_weight,  # [tokens, G], written by solve_kernel
    start_weight,  # [M, G], written by solve_kernel
    gk,  # [tokens, H] or None
    states,
    scales,
    final,
    final_scale,
    ends,  # E: the gradient is (E + E^T) / 2
    end_scales,  # the same for every block
    wholes,
    initial,  # E of the initial state
    sums,
    sum_scales,
    sum_decays,
    segments,
    bounds,
    chunk_start,
    base,
    G,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    segment, j = tl.program_id(0) // G, (tl.program_id(0) % G).to(tl.int64)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    n, first, end, before, after, begin, stop = segment_of(segments, bounds, chunk_start, segment)
    h = base + j
    places = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = block * BN + tl.arange(0, BN)
    grad = tl.zeros((BK, BN), tl.float32)
    bound, decay = 0.0, 0.0
    if SUM:
        if segment == before:
            end = first
    else:
        if final is not None:
            grad = load_state(final + (n * H + h) * K * K, rk, rv, K, K)
            bound = tl.load(final_scale + n * H + h)
        if sums is not None:
            for i in range(segment + 1, after):
                s = segment + after - i
                grad, bound = earlier(
                    grad, bound, sums, sum_scales, sum_decays, s, j, G, rk, rv, block, blocks, K, K
                )  # fmt: skip
    for i in range(first, end):
        c = first + end - 1 - i
        at = c * G + j
        row = begin + (c - first) * C
        valid = row + places < stop
        gate = load_decay(gk, row, H, h, valid)
        total = tl.sum(gate, 0)
        coarse, fine = cumulative_decays(gate)
        zeta, whole = tl.exp(coarse + fine), tl.exp(total)
        stored = load_state(states + at * K * K, rk, rv, K, K)
        scale = tl.load(scales + at * blocks + block)
        if not SUM:
            store_state(ends + at * K * K, grad * inverse(bound), rk, rv, K, K)
            tl.store(end_scales + at * blocks + block, bound)
            inner = tl.sum(tl.sum(stored.to(tl.float32) * grad, 1), 0) * scale
            tl.store(wholes + at * blocks + block, inner * whole)
        if x is None:
            grad *= whole
            bound *= whole
        else:
            grad, bound = hand_back_h(
                grad, bound, whole, zeta, x, x_scale, y, y_scale, k, tl.load(k_maxima + at),
                key_weight, tl.load(start_weight + at), stored, row, valid, h, j, rk, rv, H, G,
                HK, GK, K, OP, PREC,
            )  # fmt: skip
        decay += total
    if SUM:
        at = segment * G + j
        if segment > before:
            store_state(sums + at * K * K, grad, rk, rv, K, K)
            tl.store(sum_scales + at * blocks + block, bound)
            tl.store(sum_decays + at * blocks + block, decay)
    if initial is not None and not SUM:  # noqa: SIM102 - the compiler's condition, then the program's
        if segment == before:
            store_state(initial + (n * H + h) * K * K, grad, rk, rv, K, K)
