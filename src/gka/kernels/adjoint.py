"""The derivative's kernels, in the order of gka.maths.adjoint: solve again, then the inputs' gradients.

Every product takes float16 operands that are scaled by their largest entry, gradients included.
"""

import triton
import triton.language as tl

from gka.kernels.chunked import column_scales, sum_blocks
from gka.kernels.common import decay_mask, load_gate, load_mix, load_rows, operand, store_rows


@triton.jit
def readout_backward_kernel(
    q,
    x,  # [tokens, H, K] or None without a solve
    k,
    v,
    g,
    alpha,
    beta,
    do,  # [tokens, H, V]
    u_states,
    u_scales,
    dx,  # [tokens, H, K]: alpha dz; dz itself where alpha is absent; None without a solve
    dq,  # [tokens, H, K]: what reaches q past the solve
    dalpha,  # [tokens, H] float32 or None
    chunk_start,
    chunk_len,
    scale,
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
    SB: tl.constexpr,
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """dz_t = scale (zeta_t U_[c] do_t + sum_j W_tj (do_t . v_j) k_j), and its shares of x, q, alpha."""
    m, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    mh = m * H + h
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m) + places
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    write = load_gate(beta, row, H, h, valid, 1.0)
    b = tl.cumsum(load_gate(g, row, H, h, valid, 0.0), 0)
    zeta = tl.exp(b)
    scores = tl.zeros((C, C), tl.float32)
    dz = tl.zeros((C, BK), tl.float32)
    for block in tl.static_range(NV):
        rv = block * BV + tl.arange(0, BV)
        tile = rk[:, None] * V + rv[None, :]
        inside = (rk[:, None] < K) & (rv[None, :] < V)
        un = tl.load(u_states + mh * K * V + tile, mask=inside, other=0.0)
        dot = load_rows(do, row, H, h, V, rv, valid)
        don, do_max = operand(dot, OP)
        vn, v_max = operand(load_rows(v, row, HV, h // GV, V, rv, valid), OP)
        scores += tl.dot(don, tl.trans(vn), input_precision=PREC) * (do_max * v_max)
        don, do_max = operand(dot * column_scales(u_scales, mh, rv, V, SB)[None, :], OP)
        dz += tl.dot(don, tl.trans(un), input_precision=PREC) * (zeta * do_max)[:, None]
    sn, s_max = operand(scores * decay_mask(b, places) * (write * write)[None, :], OP)
    kn, k_max = operand(load_rows(k, row, HK, h // GK, K, rk, valid), OP)
    dz += tl.dot(sn, kn, input_precision=PREC) * (s_max * k_max)
    dz *= scale
    if x is None:
        store_rows(dq, dz, row, H, h, K, rk, valid)
    else:
        if alpha is None:
            store_rows(dx, dz, row, H, h, K, rk, valid)
            store_rows(dq, dz * 0.0, row, H, h, K, rk, valid)
        else:
            mix = load_gate(alpha, row, H, h, valid, 1.0)
            gap = load_rows(x, row, H, h, K, rk, valid) - load_rows(q, row, H, h, K, rk, valid)
            tl.store(dalpha + row * H + h, tl.sum(dz * gap, 1), mask=valid)
            store_rows(dx, mix[:, None] * dz, row, H, h, K, rk, valid)
            store_rows(dq, (1.0 - mix)[:, None] * dz, row, H, h, K, rk, valid)


@triton.jit
def decay_gradient(pairs, ends, start, whole, beta2, places):
    """dg_i of a chunk by rectangle sums, as gka.maths.adjoint states it."""
    after = tl.cumsum(pairs * beta2[None, :], 0, reverse=True)  # sum over t >= i, for each j
    rectangles = tl.sum(tl.where(places[:, None] > places[None, :], after, 0.0), 1)
    before_end = tl.cumsum(ends * beta2, 0) - ends * beta2
    return rectangles + before_end + tl.cumsum(start, 0, reverse=True) + whole


@triton.jit
def through_u_kernel(
    q,
    x,
    k,
    v,
    g,
    alpha,
    beta,
    do,
    u_states,
    u_scales,
    ends,  # [M, H, K, V]: gradient of U at each chunk's end
    dk,  # [tokens, H, K]: written
    dv,  # [tokens, H, V]
    dg,  # [tokens, H] float32 or None
    dbeta2,  # [tokens, H] float32 or None: gradient of beta^2
    chunk_start,
    chunk_len,
    scale,
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
    SB: tl.constexpr,
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    m, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    mh = m * H + h
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m) + places
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    write = load_gate(beta, row, H, h, valid, 1.0)
    beta2 = write * write
    gate = load_gate(g, row, H, h, valid, 0.0)
    b = tl.cumsum(gate, 0)
    total = tl.sum(gate, 0)
    zeta, to_end, mask = tl.exp(b), tl.exp(total - b), decay_mask(b, places)
    kt = load_rows(k, row, HK, h // GK, K, rk, valid)
    kn, k_max = operand(kt, OP)
    zn, z_max = operand(load_mix(q, x, alpha, row, H, h, K, rk, valid), OP)
    z_k = tl.dot(zn, tl.trans(kn), input_precision=PREC) * (z_max * k_max)
    ln, l_max = operand(z_k * mask * beta2[None, :], OP)
    do_v = tl.zeros((C, C), tl.float32)
    end_v = tl.zeros((C, BK), tl.float32)  # rows E v_j
    start = tl.zeros((C,), tl.float32)
    whole = 0.0
    for block in tl.static_range(NV):
        rv = block * BV + tl.arange(0, BV)
        tile = rk[:, None] * V + rv[None, :]
        inside = (rk[:, None] < K) & (rv[None, :] < V)
        dot = load_rows(do, row, H, h, V, rv, valid) * scale
        don, do_max = operand(dot, OP)
        vn, v_max = operand(load_rows(v, row, HV, h // GV, V, rv, valid), OP)
        do_v += tl.dot(don, tl.trans(vn), input_precision=PREC) * (do_max * v_max)
        un = tl.load(u_states + mh * K * V + tile, mask=inside, other=0.0)
        u_scale = column_scales(u_scales, mh, rv, V, SB)
        zu = tl.dot(zn, un, input_precision=PREC) * (u_scale * z_max)[None, :]
        start += tl.sum(zu * dot, 1)
        end = tl.load(ends + mh * K * V + tile, mask=inside, other=0.0).to(tl.float32)
        whole += tl.sum(tl.sum(un.to(tl.float32) * end, 0) * u_scale, 0)
        en, e_max = operand(end, OP)
        end_v += tl.dot(vn, tl.trans(en), input_precision=PREC) * (v_max * e_max)
        dv_now = tl.dot(tl.trans(ln), don, input_precision=PREC) * (l_max * do_max)
        dv_end = tl.dot(kn, en, input_precision=PREC) * (beta2 * to_end * (k_max * e_max))[:, None]
        store_rows(dv, dv_now + dv_end, row, H, h, V, rv, valid)
    rn, r_max = operand(do_v * mask * beta2[None, :], OP)
    dk_now = tl.dot(tl.trans(rn), zn, input_precision=PREC) * (r_max * z_max)
    dk_now += end_v * (beta2 * to_end)[:, None]
    store_rows(dk, dk_now, row, H, h, K, rk, valid)
    pairs = mask * z_k * do_v
    ends_j = to_end * tl.sum(kt * end_v, 1)
    if dg is not None:
        grad = decay_gradient(pairs, ends_j, zeta * start, tl.exp(total) * whole, beta2, places)
        tl.store(dg + row * H + h, grad, mask=valid)
    if dbeta2 is not None:
        tl.store(dbeta2 + row * H + h, tl.sum(pairs, 0) + ends_j, mask=valid)


@triton.jit
def through_h_kernel(
    x,  # [tokens, H, K]; with SOLVE
    y,
    w_t,
    key_weight,
    k,
    gk,
    beta,
    h_states,
    h_scales,
    h_norms,
    ends,  # [M, H, K, K]: gradient of H at each chunk's end
    dk,  # [tokens, H, K]: added to
    dg,  # [tokens, H] float32 or None: decay of H
    dbeta2,  # [tokens, H] float32 or None: added to
    chunk_start,
    chunk_len,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    m, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    mh = m * H + h
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m) + places
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    square = rk[:, None] * K + rk[None, :]
    in_square = (rk[:, None] < K) & (rk[None, :] < K)
    write = load_gate(beta, row, H, h, valid, 1.0)
    beta2 = write * write
    gate = load_gate(gk, row, H, h, valid, 0.0)
    b = tl.cumsum(gate, 0)
    total = tl.sum(gate, 0)
    zeta, to_end, mask = tl.exp(b), tl.exp(total - b), decay_mask(b, places)
    kt = load_rows(k, row, HK, h // GK, K, rk, valid)
    kn, k_max = operand(kt, OP)
    hn = tl.load(h_states + mh * K * K + square, mask=in_square, other=0.0)
    h_scale = tl.load(h_scales + mh * NK)
    end = tl.load(ends + mh * K * K + square, mask=in_square, other=0.0).to(tl.float32)
    whole = tl.sum(tl.sum(hn.to(tl.float32) * end, 1), 0) * (h_scale * tl.exp(total))
    en, e_max = operand(end, OP)
    end_k = tl.dot(kn, en, input_precision=PREC) * (k_max * e_max)
    ends_j = to_end * tl.sum(kt * end_k, 1)
    grad_k = load_rows(dk, row, H, h, K, rk, valid) + end_k * (2.0 * beta2 * to_end)[:, None]
    pairs = tl.zeros((C, C), tl.float32)
    start = tl.zeros((C,), tl.float32)
    if SOLVE:
        weight = mask * (beta2 * k_max * k_max)[None, :]
        w = tl.load(w_t + row * H + h, mask=valid, other=0.0)
        xn, x_max = operand(load_rows(x, row, H, h, K, rk, valid), OP)
        yt = load_rows(y, row, H, h, K, rk, valid)
        yn, y_max = operand(yt, OP)
        x_k = tl.dot(xn, tl.trans(kn), input_precision=PREC) * (x_max * k_max)
        y_k = tl.dot(yn, tl.trans(kn), input_precision=PREC) * (y_max * k_max)
        ln, l_max = operand(x_k * mask * beta2[None, :], OP)
        grad_k -= tl.dot(tl.trans(ln), yn, input_precision=PREC) * (l_max * y_max)
        ln, l_max = operand(y_k * mask * beta2[None, :], OP)
        grad_k -= tl.dot(tl.trans(ln), xn, input_precision=PREC) * (l_max * x_max)
        # the ridge's part: W^T diag(w) W over the keys, and a multiple of H_[c] k_j
        wn, w_max = operand(mask * beta2[None, :], OP)
        rn, r_max = operand(w[:, None] * mask * beta2[None, :], OP)
        full = tl.dot(tl.trans(wn), rn, input_precision=PREC) * (w_max * r_max)
        gram = tl.dot(kn, tl.trans(kn), input_precision=PREC)
        ln, l_max = operand(full * gram * (k_max * k_max), OP)
        grad_k -= tl.dot(ln, kn, input_precision=PREC) * (l_max * k_max)
        kh = tl.dot(kn, hn, input_precision=PREC) * (h_scale * k_max)
        of_start = tl.load(key_weight + row * H + h, mask=valid, other=0.0)
        grad_k -= kh * of_start[:, None]
        # s_j and (W (K K^T)^2)_tj, in units of k_max^2
        energies = tl.sum(kh * kt, 1)
        pair = tl.dot(weight, gram * gram, input_precision=PREC) * (k_max * k_max)
        pairs = -mask * (x_k * y_k + 0.5 * w[:, None] * (zeta[:, None] * energies[None, :] + pair))
        h_norm2 = sum_blocks(h_norms, mh, NK)
        inner = zeta * h_norm2 + tl.sum(mask * (beta2 * energies)[None, :], 1)
        x_h_y = tl.sum(tl.dot(xn, hn, input_precision=PREC) * yt, 1) * (x_max * h_scale)
        start = -zeta * (x_h_y + 0.5 * w * inner)
    store_rows(dk, grad_k, row, H, h, K, rk, valid)
    if dg is not None:
        grad = decay_gradient(pairs, ends_j, start, whole, beta2, places)
        tl.store(dg + row * H + h, grad, mask=valid)
    if dbeta2 is not None:
        old = tl.load(dbeta2 + row * H + h, mask=valid, other=0.0)
        tl.store(dbeta2 + row * H + h, old + tl.sum(pairs, 0) + ends_j, mask=valid)
