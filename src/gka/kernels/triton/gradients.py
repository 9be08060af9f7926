"""Gradients of the inputs of one chunk of one head, through U and through H (gka.maths.adjoint).

Operands are float16 (float32 for float32 inputs), divided by the largest entry of their chunk where
their size is not known. The scans, which read the same tiles, supply these maxima.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import (
    add_product,
    cumulative_decays,
    decay_mask,
    decays_to_end,
    inverse,
    load_decay,
    load_gate,
    load_mix,
    load_raw,
    load_rows,
    load_state,
    shares,
    store_gate,
    store_rows,
    sum_blocks,
)
from gka.kernels.triton.scan import unit_of


@triton.jit
def max_blocks(ptr, index, N: tl.constexpr):
    """The largest of N consecutive numbers."""
    largest = 0.0
    for i in tl.static_range(N):
        largest = tl.maximum(largest, tl.load(ptr + index * N + i))
    return largest


@triton.jit
def decay_gradient(pairs, ends, start, whole, beta2, places, PREC: tl.constexpr):
    """dg_i of a chunk by rectangle sums, as in gka.maths.adjoint; pairs without beta_j^2."""
    since = tl.where(places[:, None] <= places[None, :], 1.0, 0.0)
    after = (
        tl.dot(since, pairs, input_precision=PREC) * beta2[None, :]
    )  # sum over t >= i, for each j
    earlier_keys = places[:, None] > places[None, :]
    rectangles = tl.sum(tl.where(earlier_keys, after, 0.0), 1)
    # A sum of its own: a running sum minus its last term would keep that term's rounding. Added to
    # `after` instead, Triton 3.6 compiled an illegal memory access for keys 200 wide on an H200.
    before_end = tl.sum(tl.where(earlier_keys, (ends * beta2)[None, :], 0.0), 1)
    return rectangles + before_end + tl.cumsum(start, 0, reverse=True) + whole


@triton.jit
def through_u_kernel(
    q,
    x,
    x_scale,
    k,
    v,
    g,
    alpha,
    beta,
    do,
    ends,  # [M, G, K, V] OP: gradient E of U at each chunk's end / end_scale
    end_scales,  # [M, G, NV] float32
    wholes,  # [M, G, NV] float32: decay over the chunk times <U_[c], E>
    start_u,  # [tokens, G] float32
    k_maxima,  # [M, G] float32: max |k| of the chunk
    v_maxima,  # [M, G, NV]
    z_maxima,  # [M, G]
    d_maxima,  # [M, G, NV]: max |do|
    dk,  # [tokens, dk_heads, K]: written from head dk_base on
    dv,  # [tokens, dv_heads, V]
    dg,  # [tokens, H] float32 or None
    dbeta2,  # [tokens, H] float32 or None: gradient of beta^2
    chunk_start,
    chunk_len,
    scale,
    dk_base,
    dk_heads,
    dv_base,
    dv_heads,
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
    BV: tl.constexpr,
    NV: tl.constexpr,
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    m, j = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    mh, h = m * G + j, base + j
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m)
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    k_max, z_max = tl.load(k_maxima + mh), tl.load(z_maxima + mh)
    v_max, d_max = max_blocks(v_maxima, mh, NV), max_blocks(d_maxima, mh, NV)
    e_max = max_blocks(end_scales, mh, NV)
    kn = (load_rows(k, row, HK, h // GK, K, rk, valid) * inverse(k_max)).to(OP)
    zn = (load_mix(q, x, x_scale, alpha, row, H, h, K, rk, valid) * inverse(z_max)).to(OP)
    log_decays = load_decay(g, row, H, h, valid)
    coarse, fine = cumulative_decays(log_decays)
    mask = decay_mask(coarse, fine, places).to(OP)
    # |zn kn^T| <= K is in float16's range
    ln = (tl.dot(zn, tl.trans(kn), input_precision=PREC) * mask.to(tl.float32)).to(OP)
    write = load_gate(beta, row, H, h, valid, 1.0)
    beta2 = write * write
    _total, to_end = decays_to_end(load_decay(g, row, H, h, valid))
    do_v = tl.zeros((C, C), tl.float32)
    end_v = tl.zeros((C, BK), tl.float32)  # rows E v_j
    for block in tl.static_range(NV):
        rv = block * BV + tl.arange(0, BV)
        en = load_state(ends + mh * K * V, rk, rv, K, V)
        e_scale = tl.load(end_scales + mh * NV + block)
        dv_t = tl.dot(kn, en, input_precision=PREC) * (to_end * (k_max * e_scale))[:, None]
        dn = (load_rows(do, row, H, h, V, rv, valid) * inverse(d_max)).to(OP)
        dv_t += tl.dot(tl.trans(ln), dn, input_precision=PREC) * (z_max * k_max * d_max * scale)
        store_rows(dv, dv_t * beta2[:, None], row, dv_heads, dv_base + j, V, rv, valid)
        vt = load_rows(v, row, HV, h // GV, V, rv, valid) * inverse(v_max)
        do_v = tl.dot(dn, tl.trans(vt.to(OP)), do_v, input_precision=PREC)
        vn = (vt * (e_scale * inverse(e_max))).to(OP)
        end_v = tl.dot(vn, tl.trans(en), end_v, input_precision=PREC)
    end_v *= (to_end * (v_max * e_max))[:, None]
    # k is loaded again: kept from above, it would hold registers through the loop
    ends_j = tl.sum(load_rows(k, row, HK, h // GK, K, rk, valid) * end_v, 1)
    rn = (do_v * mask.to(tl.float32)).to(OP)
    end_v += tl.dot(tl.trans(rn), zn, input_precision=PREC) * (d_max * v_max * z_max * scale)
    store_rows(dk, end_v * beta2[:, None], row, dk_heads, dk_base + j, K, rk, valid)
    pairs = ln.to(tl.float32) * do_v * ((z_max * k_max) * (d_max * v_max) * scale)
    if dg is not None:
        start = load_gate(start_u, row, G, j, valid, 0.0)
        grad = decay_gradient(pairs, ends_j, start, sum_blocks(wholes, mh, NV), beta2, places, PREC)
        store_gate(dg, grad, row, H, h, valid)
    if dbeta2 is not None:
        store_gate(dbeta2, tl.sum(pairs, 0) + ends_j, row, H, h, valid)


@triton.jit
def through_h_kernel(
    x,  # [tokens, H, K]: rows divided by x_scale; None without SOLVE
    x_scale,
    y,  # [tokens, G, K]: rows divided by y_scale
    y_scale,
    p_t,  # [tokens, G]: 2 a <x_t, y_t>
    fro,  # [tokens, G]: F_t
    start_h,  # [tokens, G]: x_t^T H_[c] y_t
    key_weight,  # [tokens, G]
    k,
    gk,
    beta,
    h_start,
    h_scales,
    h_norms,
    ends,  # [M, G, K, K] OP: E / end_scale; the gradient of H at each chunk's end is (E + E^T) / 2
    end_scales,  # [M, G, NK] float32
    wholes,  # [M, G, NK] float32: decay over the chunk times <H_[c], E>
    k_maxima,  # [M, G] float32: max |k| of the chunk
    dk,  # [tokens, dk_heads, K]: added to
    dg,  # [tokens, H] float32 or None: decay of H
    dbeta2,  # [tokens, H] float32 or None: added to
    chunk_start,
    chunk_len,
    dk_base,
    dk_heads,
    base,
    G,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    C: tl.constexpr,
    TILED: tl.constexpr,  # read E and H_[c] in quarters
    SOLVE: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    m, j = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    mh, h = m * G + j, base + j
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m)
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    k_max = tl.load(k_maxima + mh)
    kt = load_rows(k, row, HK, h // GK, K, rk, valid)
    share, power = shares(tl.max(tl.abs(kt), 1), k_max)
    kn, size = (kt * (power * inverse(k_max))[:, None]).to(OP), k_max * share  # k_j / s_j, s_j
    e_ptr = ends + mh * K * K
    en = None if TILED else load_state(e_ptr, rk, rk, K, K)
    e_scale = tl.load(end_scales + mh * NK)
    log_decays = load_decay(gk, row, H, h, valid)
    coarse, fine = cumulative_decays(log_decays)
    _total, to_end = decays_to_end(load_decay(gk, row, H, h, valid))
    write = load_gate(beta, row, H, h, valid, 1.0)
    beta2 = write * write
    grad_k = tl.zeros((C, BK), tl.float32)
    grad_k = add_product(grad_k, kn, en, e_ptr, K, TILED, False, PREC)
    grad_k = add_product(grad_k, kn, en, e_ptr, K, TILED, True, PREC)  # rows (E + E^T) k_j
    grad_k *= (to_end * (size * e_scale))[:, None]
    ends_j = tl.sum(kn.to(tl.float32) * grad_k, 1) * (0.5 * size)
    grad_k *= beta2[:, None]
    pairs = tl.zeros((C, C), tl.float32)
    start = tl.zeros((C,), tl.float32)
    if SOLVE:
        h_ptr = h_start + mh * K * K
        hn = None if TILED else load_state(h_ptr, rk, rk, K, K)
        h_scale = tl.load(h_scales + mh * NK)
        of_start = load_gate(key_weight, row, G, j, valid, 0.0) * inverse(size)
        kh = tl.zeros((C, BK), tl.float32)
        kh = add_product(kh, kn, hn, h_ptr, K, TILED, False, PREC) * h_scale
        energies = tl.sum(kh * kn.to(tl.float32), 1) * size * size
        grad_k -= kh * of_start[:, None]
        written = beta2 * size
        most_written = tl.max(written, 0)
        relative = written * inverse(most_written)
        # bound of grad_k
        bound = (tl.max(tl.abs(of_start), 0) * h_scale + 2.0 * most_written * e_scale) * K
        mask = decay_mask(coarse, fine, places).to(OP)
        # ridge term: M^T diag(p) R over the keys, and (R (K K^T)^2)_tj, with R = W s^2 / F <= 4
        p = load_gate(p_t, row, G, j, valid, 0.0)
        per_f = inverse(load_gate(fro, row, G, j, valid, 0.0))
        gram = tl.dot(kn, tl.trans(kn), input_precision=PREC)  # |.| <= K
        weighted = mask.to(tl.float32) * (written * size)[None, :]
        row_max = tl.max(weighted, 1)
        weighted *= inverse(row_max)[:, None]
        row_max *= per_f
        pairs = tl.dot(weighted.to(OP), (gram * gram * (1.0 / K)).to(OP), input_precision=PREC)
        pairs *= (row_max * K)[:, None] * (size * size)[None, :]
        of_row = p * row_max
        p_max = tl.max(tl.abs(of_row), 0)
        weighted *= (of_row * inverse(p_max))[:, None]
        full = tl.dot(tl.trans(mask), weighted.to(OP), input_precision=PREC)  # |.| <= C
        full = full * gram * (-relative)[:, None]
        largest = p_max * most_written
        unit = unit_of(largest, bound, 1.0)
        grad_k = (
            tl.dot((full * (largest / unit)).to(OP), kn, grad_k / unit, input_precision=PREC) * unit
        )
        bound += tl.max(tl.abs(p), 0) * most_written * (C * K)  # tr H_t <= K^1/2 F_t
        zeta = tl.exp(coarse + fine)
        pairs = (0.5 * p)[:, None] * ((zeta * per_f)[:, None] * energies[None, :] + pairs)
        inner = zeta * sum_blocks(h_norms, mh, NK)
        inner = per_f * (inner + tl.sum(mask.to(tl.float32) * (beta2 * energies)[None, :], 1))
        start = -zeta * (load_gate(start_h, row, G, j, valid, 0.0) + 0.5 * p * inner)
        # term of the solve
        xn = load_raw(x, row, H, h, K, rk, valid)
        yn = load_raw(y, row, G, j, K, rk, valid)
        both = load_gate(x_scale, row, H, h, valid, 0.0) * load_gate(y_scale, row, G, j, valid, 0.0)
        both_max = tl.max(both, 0)
        largest = both_max * most_written
        unit = unit_of(largest, bound, 1.0)
        of_row, of_column = both * inverse(both_max) * (largest / unit), -relative
        x_k = tl.dot(xn, tl.trans(kn), input_precision=PREC)
        y_k = tl.dot(yn, tl.trans(kn), input_precision=PREC)
        pairs = -mask.to(tl.float32) * (
            pairs + x_k * y_k * (both[:, None] * (size * size)[None, :])
        )
        weight = mask.to(tl.float32) * of_row[:, None] * of_column[None, :]
        x_k = (x_k * weight).to(OP)
        y_k = (y_k * weight).to(OP)
        grad_k = tl.dot(tl.trans(x_k), yn, grad_k / unit, input_precision=PREC)
        grad_k = tl.dot(tl.trans(y_k), xn, grad_k, input_precision=PREC) * unit
    grad_k += load_rows(dk, row, dk_heads, dk_base + j, K, rk, valid)
    store_rows(dk, grad_k, row, dk_heads, dk_base + j, K, rk, valid)
    if dg is not None:
        grad = decay_gradient(pairs, ends_j, start, sum_blocks(wholes, mh, NK), beta2, places, PREC)
        store_gate(dg, grad, row, H, h, valid)
    if dbeta2 is not None:
        old = load_gate(dbeta2, row, H, h, valid, 0.0)
        store_gate(dbeta2, old + tl.sum(pairs, 0) + ends_j, row, H, h, valid)
