"""Mix and readout of one chunk of one head, and their adjoints."""

import triton
import triton.language as tl

from gka.kernels.triton.common import (
    cumulative_decays,
    decay_mask,
    key_operand,
    load_decay,
    load_gate,
    load_mix,
    load_rows,
    load_scaled,
    load_state,
    operand,
    store_gate,
    store_rows,
    store_scaled,
)


@triton.jit
def readout_kernel(
    q,  # [tokens, H, K]
    x,  # [tokens, H, K] or None without a solve: rows divided by x_scale
    x_scale,  # [tokens, H] float32, with x
    k,  # [tokens, HK, K]
    v,  # [tokens, HV, V]
    g,  # [tokens, H] or None: decay of U
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    u_start,  # [M, G, K, V] OP
    u_scales,  # [M, G, NV] float32
    o,  # [tokens, H, V]
    chunk_start,
    chunk_len,
    scale,
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
    """o_t = scale U_t^T z_t for one chunk of one head: mix and readout."""
    m, j = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    mh, h = m * G + j, base + j
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m)
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    write = load_gate(beta, row, H, h, valid, 1.0)
    kn, share, k_max = key_operand(load_rows(k, row, HK, h // GK, K, rk, valid), OP)
    z = load_mix(q, x, x_scale, alpha, row, H, h, K, rk, valid)
    zn, z_max = operand(z, OP)
    log_decays = load_decay(g, row, H, h, valid)
    coarse, fine = cumulative_decays(log_decays)
    zeta = tl.exp(coarse + fine)
    weight = decay_mask(coarse, fine, places) * (write * write * share)[None, :]
    pn, p_max = operand(tl.dot(zn, tl.trans(kn), input_precision=PREC) * weight, OP)
    for block in tl.static_range(NV):
        rv = block * BV + tl.arange(0, BV)
        un = load_state(u_start + mh * K * V, rk, rv, K, V)
        past = tl.dot(zn, un, input_precision=PREC)
        past *= (zeta * tl.load(u_scales + mh * NV + block))[:, None]
        vn, v_max = operand(load_rows(v, row, HV, h // GV, V, rv, valid), OP)
        now = tl.dot(pn, vn, input_precision=PREC) * (p_max * v_max * k_max)
        store_rows(o, (past + now) * (scale * z_max), row, H, h, V, rv, valid)


@triton.jit
def readout_backward_kernel(
    q,
    x,  # [tokens, H, K] or None without a solve: rows divided by x_scale
    x_scale,  # [tokens, H] float32, with x
    k,
    v,
    g,
    alpha,
    beta,
    do,  # [tokens, H, V]
    u_start,
    u_scales,
    dx,  # [tokens, G, K]: alpha dz, or dz where alpha is absent; rows divided by dx_scale; with x
    dx_scale,  # [tokens, G] float32, with x
    dq,  # [tokens, H, K]: what reaches q past the solve
    dalpha,  # [tokens, H] float32 or None
    start_u,  # [tokens, G] float32: scale zeta_t z_t^T U_[c] do_t
    chunk_start,
    chunk_len,
    scale,
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
    """dz_t = scale (zeta_t U_[c] do_t + sum_j W_tj (do_t . v_j) k_j); from it dx, dq and dalpha."""
    m, j = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    mh, h = m * G + j, base + j
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m)
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    write = load_gate(beta, row, H, h, valid, 1.0)
    log_decays = load_decay(g, row, H, h, valid)
    coarse, fine = cumulative_decays(log_decays)
    zeta = tl.exp(coarse + fine)
    scores = tl.zeros((C, C), tl.float32)
    dz = tl.zeros((C, BK), tl.float32)
    for block in tl.static_range(NV):
        rv = block * BV + tl.arange(0, BV)
        un = load_state(u_start + mh * K * V, rk, rv, K, V)
        dot = load_rows(do, row, H, h, V, rv, valid)
        don, do_max = operand(dot, OP)
        vn, v_max = operand(load_rows(v, row, HV, h // GV, V, rv, valid), OP)
        scores += tl.dot(don, tl.trans(vn), input_precision=PREC) * (do_max * v_max)
        u_scale = tl.load(u_scales + mh * NV + block)
        dz += tl.dot(don, tl.trans(un), input_precision=PREC) * (zeta * (do_max * u_scale))[:, None]
    z = load_mix(q, x, x_scale, alpha, row, H, h, K, rk, valid)
    store_gate(start_u, tl.sum(z * dz, 1) * scale, row, G, j, valid)
    sn, s_max = operand(scores * decay_mask(coarse, fine, places) * (write * write)[None, :], OP)
    kn, k_max = operand(load_rows(k, row, HK, h // GK, K, rk, valid), OP)
    dz += tl.dot(sn, kn, input_precision=PREC) * (s_max * k_max)
    dz *= scale
    if x is None:
        store_rows(dq, dz, row, H, h, K, rk, valid)
    else:
        if alpha is None:
            store_scaled(dx, dx_scale, dz, row, G, j, K, rk, valid)
            store_rows(dq, dz * 0.0, row, H, h, K, rk, valid)
        else:
            mix = load_gate(alpha, row, H, h, valid, 1.0)
            gap = load_scaled(x, x_scale, row, H, h, K, rk, valid)
            gap -= load_rows(q, row, H, h, K, rk, valid)
            store_gate(dalpha, tl.sum(dz * gap, 1), row, H, h, valid)
            store_scaled(dx, dx_scale, mix[:, None] * dz, row, G, j, K, rk, valid)
            store_rows(dq, (1.0 - mix)[:, None] * dz, row, H, h, K, rk, valid)
