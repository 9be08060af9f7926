"""Scans over chunks on the GPU: the moments H and U.

A sequence is cut into segments of consecutive chunks. `moments_segments_kernel` sums what every segment
adds to a state that starts from zero. `moments_kernel` then starts each segment from the sum of the
segments before it, in their order. One program owns a block of columns of one head's state in one
segment: nothing is reduced across programs, and the result does not depend on scheduling.

Stored states are divided by a running bound on their entries: |S| <= scale.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import (
    decays_to_end,
    inverse,
    load_decay,
    load_gate,
    load_raw,
    load_state,
    row_maxima,
    store_state,
)

NEGLIGIBLE: tl.constexpr = tl.constexpr(1e-30)


@triton.jit
def segment_of(segments, bounds, chunk_start, index):
    """(sequence, first and end chunk, the sequence's first and end segment, its first and end token)."""
    n = tl.load(segments + index * 5)
    first = tl.load(segments + index * 5 + 1)
    end = tl.load(segments + index * 5 + 2)
    before = tl.load(segments + index * 5 + 3)
    after = tl.load(segments + index * 5 + 4)
    begin = tl.load(chunk_start + first, mask=first < end, other=0)
    return n.to(tl.int64), first, end, before, after, begin, tl.load(bounds + n + 1)


@triton.jit
def unit_of(largest, scale, whole):
    """The divisor of operands: with it they are at most one, and S whole / unit does not overflow."""
    return tl.maximum(tl.maximum(largest, scale * whole * NEGLIGIBLE), NEGLIGIBLE)


@triton.jit
def scaled_rows(kt, vt, weight, k_max, unit):
    """Rows of at most one: key rows over their largest entry, value rows times all other factors."""
    kn = kt.to(tl.float32) * inverse(k_max)[:, None]
    vn = vt.to(tl.float32) * (weight * k_max / unit)[:, None]
    return kn, vn


@triton.jit
def add_chunk(
    state, scale, k, v, g, beta, row, valid, h, rk, rv, H,
    HK: tl.constexpr, HV: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, IS_H: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """S <- S whole + sum_j w_j k_j v_j^T; returns S, its bound, the log decay, max|k|, max|v|."""
    kt = load_raw(k, row, HK, h // GK, K, rk, valid)
    vt = load_raw(v, row, HV, h // GV, V, rv, valid)
    gate = load_decay(g, row, H, h, valid)
    write = load_gate(beta, row, H, h, valid, 1.0)
    total, to_end = decays_to_end(gate)
    weight = to_end * write * write
    whole = tl.exp(total)
    k_max = row_maxima(kt)
    v_max = k_max if IS_H else row_maxima(vt)
    largest = tl.sum(weight * k_max * v_max, 0)
    unit = unit_of(largest, scale, whole)
    kn, vn = scaled_rows(kt, vt, weight, k_max, unit)
    state = state * (whole / unit)
    state = tl.dot(tl.trans(kn.to(OP)), vn.to(OP), state, input_precision=PREC) * unit
    return state, scale * whole + largest, total, tl.max(k_max, 0), tl.max(v_max, 0)


@triton.jit
def sum_segment(
    k, v, g, beta, sums, sum_scales, sum_decays, segments, bounds, chunk_start, index, block, blocks,
    base, G, H,
    HK: tl.constexpr, HV: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, IS_H: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    segment, j = index // G, (index % G).to(tl.int64)
    _n, first, end, _before, after, begin, stop = segment_of(segments, bounds, chunk_start, segment)
    places = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = block * BV + tl.arange(0, BV)
    if segment + 1 < after:  # no segment starts from the sum of the last one
        state = tl.zeros((BK, BV), tl.float32)
        scale, decay = 0.0, 0.0
        for c in range(first, end):
            row = begin + (c - first) * C
            state, scale, total, _k_max, _v_max = add_chunk(
                state, scale, k, v, g, beta, row, row + places < stop, base + j, rk, rv, H,
                HK, HV, GK, GV, K, V, IS_H, OP, PREC,
            )  # fmt: skip
            decay += total
        at = segment * G + j
        store_state(sums + at * K * V, state, rk, rv, K, V)
        tl.store(sum_scales + at * blocks + block, scale)
        tl.store(sum_decays + at * blocks + block, decay)


@triton.jit
def moments_segments_kernel(
    k,  # [tokens, HK, K]
    v,  # [tokens, HV, V]
    gk,  # [tokens, H] or None: decay of H
    g,  # [tokens, H] or None: decay of U
    beta,  # [tokens, H] or None
    sums_h,  # [S, G, K, K] float32
    scales_h,  # [S, G, NK] float32
    decays_h,  # [S, G, NK] float32, log
    sums_u,  # [S, G, K, V]
    scales_u,  # [S, G, NV]
    decays_u,  # [S, G, NV]
    segments,  # [S, 5] int32
    bounds,  # [N+1] int64: first token of each sequence
    chunk_start,  # [M] int64
    base,  # first head of the G heads
    G,
    H,
    HK: tl.constexpr,
    HV: tl.constexpr,
    GK: tl.constexpr,  # heads that share a key head
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,  # columns of H a program owns
    BV: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """S of every segment but a sequence's last, started from zero; the first NK blocks are H's."""
    index, block = tl.program_id(0), tl.program_id(1)
    if NK > 0:  # noqa: SIM102 - two conditions, since without H its arrays are None
        if block < NK:
            sum_segment(
                k, k, gk, beta, sums_h, scales_h, decays_h, segments, bounds, chunk_start, index,
                block, NK, base, G, H, HK, HK, GK, GK, K, K, BK, BN, C, True, OP, PREC,
            )  # fmt: skip
    if block >= NK:
        sum_segment(
            k, v, g, beta, sums_u, scales_u, decays_u, segments, bounds, chunk_start, index,
            block - NK, NV, base, G, H, HK, HV, GK, GV, K, V, BK, BV, C, False, OP, PREC,
        )  # fmt: skip


@triton.jit
def earlier(
    state, scale, sums, sum_scales, sum_decays, s, j, G, rk, rv, block, blocks,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A state, advanced by one segment's sum."""
    at = s * G + j
    whole = tl.exp(tl.load(sum_decays + at * blocks + block))
    added = load_state(sums + at * K * V, rk, rv, K, V)
    return state * whole + added, scale * whole + tl.load(sum_scales + at * blocks + block)


@triton.jit
def scan_segment(
    k, v, g, beta, s0, s0_scale, states, scales, norms, final, k_maxima, v_maxima,
    sums, sum_scales, sum_decays, segments, bounds, chunk_start, index, block, blocks, base, G, H,
    HK: tl.constexpr, HV: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, IS_H: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    segment, j = index // G, (index % G).to(tl.int64)
    n, first, end, before, after, begin, stop = segment_of(segments, bounds, chunk_start, segment)
    h = base + j
    places = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = block * BV + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    scale = 0.0
    if s0 is not None:
        state = load_state(s0 + (n * H + h) * K * V, rk, rv, K, V)
        scale = tl.load(s0_scale + n * H + h)
    if sums is not None:
        for s in range(before, segment):
            state, scale = earlier(
                state, scale, sums, sum_scales, sum_decays, s, j, G, rk, rv, block, blocks, K, V
            )  # fmt: skip
    for c in range(first, end):
        at = c * G + j
        store_state(states + at * K * V, state * inverse(scale), rk, rv, K, V)
        tl.store(scales + at * blocks + block, scale)
        if norms is not None:
            tl.store(norms + at * blocks + block, tl.sum(tl.sum(state * state, 1), 0))
        row = begin + (c - first) * C
        state, scale, _total, k_max, v_max = add_chunk(
            state, scale, k, v, g, beta, row, row + places < stop, h, rk, rv, H,
            HK, HV, GK, GV, K, V, IS_H, OP, PREC,
        )  # fmt: skip
        if k_maxima is not None:
            tl.store(k_maxima + at, k_max, mask=block == 0)
            tl.store(v_maxima + at * blocks + block, v_max)
    if final is not None:  # noqa: SIM102 - the compiler's condition, then the program's
        if segment + 1 == after:
            store_state(final + (n * H + h) * K * V, state, rk, rv, K, V)


@triton.jit
def moments_kernel(
    k,
    v,
    gk,
    g,
    beta,
    h0,  # [N, H, K, K] float32 or None
    h0_scale,  # [N, H] float32, max |h0| of a head; with h0
    h_start,  # [M, G, K, K] OP: H_[c] / scale
    h_scales,  # [M, G, NK] float32, the same for every block
    h_norms,  # [M, G, NK] float32: sum of H_[c]^2 over the block's columns
    h_final,  # [N, H, K, K] float32 or None
    u0,
    u0_scale,
    u_start,  # [M, G, K, V]
    u_scales,  # [M, G, NV]
    u_final,
    k_maxima,  # [M, G] float32 or None: max |k| of the chunk
    v_maxima,  # [M, G, NV] float32, with k_maxima
    sums_h,  # from moments_segments_kernel; None if every sequence is one segment
    sum_scales_h,
    sum_decays_h,
    sums_u,
    sum_scales_u,
    sum_decays_u,
    segments,
    bounds,
    chunk_start,
    base,
    G,
    H,
    HK: tl.constexpr,
    HV: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    NK: tl.constexpr,  # 0 if H is not wanted
    NV: tl.constexpr,
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """H and U at the start of every chunk, and final states; the first NK blocks are H's."""
    index, block = tl.program_id(0), tl.program_id(1)
    if NK > 0:  # noqa: SIM102 - two conditions, since without H its arrays are None
        if block < NK:
            scan_segment(
                k, k, gk, beta, h0, h0_scale, h_start, h_scales, h_norms, h_final, None, None,
                sums_h, sum_scales_h, sum_decays_h, segments, bounds, chunk_start, index,
                block, NK, base, G, H, HK, HK, GK, GK, K, K, BK, BN, C, True, OP, PREC,
            )  # fmt: skip
    if block >= NK:
        scan_segment(
            k, v, g, beta, u0, u0_scale, u_start, u_scales, None, u_final, k_maxima, v_maxima,
            sums_u, sum_scales_u, sum_decays_u, segments, bounds, chunk_start, index,
            block - NK, NV, base, G, H, HK, HV, GK, GV, K, V, BK, BV, C, False, OP, PREC,
        )  # fmt: skip
