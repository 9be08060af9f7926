"""The forward kernels of one chunk of one head: ridge and solve, then mix and readout."""

import triton
import triton.language as tl

from gka.kernels.chebyshev import chebyshev
from gka.kernels.common import (
    add_product,
    cumulative_decays,
    decay_mask,
    key_operand,
    load_decay,
    load_gate,
    load_mix,
    load_raw,
    load_rows,
    load_scaled,
    load_state,
    operand,
    store_gate,
    store_rows,
    store_scaled,
)
from gka.kernels.ridge import chunk_system


@triton.jit
def sum_blocks(ptr, index, N: tl.constexpr):
    """Sum of N consecutive numbers."""
    total = 0.0
    for i in tl.static_range(N):
        total += tl.load(ptr + index * N + i)
    return total


@triton.jit
def solve_kernel(
    rhs,  # [tokens, H, K]: q; in the derivative dx [tokens, G, K], rows divided by rhs_scale
    rhs_scale,  # [tokens, G] float32 or None
    k,  # [tokens, HK, K]
    gk,  # [tokens, H] or None: decay of H
    beta,  # [tokens, H] or None
    h_states,  # [M, G, K, K] OP
    h_scales,  # [M, G, NK] float32
    h_norms,  # [M, G, NK] float32
    x,  # the solutions, like rhs: rows divided by x_scale; may be rhs itself
    x_scale,  # [tokens, H] float32, or [tokens, G] in the derivative
    # only in the derivative (ADJOINT), where x above is y:
    forward_x,  # [tokens, H, K]
    forward_scale,  # [tokens, H]
    dq,  # [tokens, H, K]: y is added to it
    p_t,  # [tokens, G] float32: p_t = 2 a <x_t, y_t>; over F_t it could overflow
    fro,  # [tokens, G] float32: F_t
    start_h,  # [tokens, G] float32: x_t^T H_[c] y_t
    key_weight,  # [tokens, G] float32: sum_t zeta_t p_t W_tj s_j^2 / F_t, s_j of key_operand
    start_weight,  # [M, G] float32: sum_t zeta_t^2 p_t / F_t times h_scales
    # only with the adaptive solver, as certify_kernel left them:
    nystroem,  # [tokens, G, K] OP: w_t
    tau,  # [tokens, G] float32
    phi,  # [M, G] float32
    steps,  # [M, G] int32
    chunk_start,
    chunk_len,
    ridge_ratio,
    num_iter,
    empty_below,
    base,  # first head of the G heads
    G,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    C: tl.constexpr,
    TILED: tl.constexpr,  # read H_[c] in quarters wherever it is needed
    ADJOINT: tl.constexpr,
    PART: tl.constexpr,  # the chunks that are solved: "all", "plain" or "deflated"
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """x_t = p_r(A_t) rhs_t for one chunk of one head: ridge and solve.

    With the adaptive solver a launch for the chunks that run plain and one for those with N_t.
    """
    m, j = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    mh, h = m * G + j, base + j
    if PART != "all":
        count = tl.load(steps + mh)
        if (count < num_iter) != (PART == "deflated"):
            return
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m)
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    write = load_gate(beta, row, H, h, valid, 1.0)
    kn, share, k_max = key_operand(load_rows(k, row, HK, h // GK, K, rk, valid), OP)
    size = k_max * share
    log_decays = load_decay(gk, row, H, h, valid)
    coarse, fine = cumulative_decays(log_decays)
    zeta = tl.exp(coarse + fine)
    weight = decay_mask(coarse, fine, places) * (write * write * size * size)[None, :]
    h_ptr = h_states + mh * K * K
    hn = None if TILED else load_state(h_ptr, rk, rk, K, K)
    h_scale = tl.load(h_scales + mh * NK)
    h_norm2 = sum_blocks(h_norms, mh, NK)
    _, _, fro2 = chunk_system(
        kn, hn, h_ptr, h_scale, h_norm2, zeta, weight, K, TILED, PREC
    )  # fmt: skip
    empty = fro2 < empty_below * empty_below
    f = tl.sqrt(tl.where(empty, 1.0, fro2))
    top = tl.load(phi + mh) if PART == "deflated" else 1.0  # (kappa - 1) a
    rho = 1.0 / (top + 2.0 * ridge_ratio)
    unit = 2.0 * rho / f  # 2/(L + mu), and 2/((kappa + 1) lambda) with N_t
    if ADJOINT:
        right = load_scaled(rhs, rhs_scale, row, G, j, K, rk, valid)
    else:
        right = load_rows(rhs, row, H, h, K, rk, valid)
    largest = tl.max(tl.abs(right), 1)
    largest = tl.where(largest > 0.0, largest, 1.0)
    w_ptr, taken = None, None
    if PART == "deflated":
        w_ptr = nystroem + (row * G + j) * K
        taken = load_gate(tau, row, G, j, valid, 0.0)
        num_iter = count
    solution = chebyshev(
        tl.where(empty[:, None], 0.0, right / largest[:, None]),
        kn,
        hn,
        h_ptr,
        zeta * h_scale * unit,
        weight * unit[:, None],
        2.0 * ridge_ratio * rho,
        rho * rho * top * top,
        num_iter,
        w_ptr,
        taken,
        G,
        valid,
        K,
        TILED,
        OP,
        PREC,
    )
    solution *= (unit * largest)[:, None]
    if ADJOINT:
        store_scaled(x, x_scale, solution, row, G, j, K, rk, valid)
        raw = load_raw(forward_x, row, H, h, K, rk, valid)
        x_size = load_gate(forward_scale, row, H, h, valid, 0.0)
        p = tl.sum(raw.to(tl.float32) * solution, 1) * x_size
        p = tl.where(empty, 0.0, 2.0 * ridge_ratio * p)
        x_h = tl.zeros(solution.shape, tl.float32)
        x_h = add_product(x_h, raw, hn, h_ptr, K, TILED, False, PREC)
        x_h_y = tl.sum(x_h * solution, 1) * (x_size * h_scale)
        write = load_gate(beta, row, H, h, valid, 1.0)
        log_decays = load_decay(gk, row, H, h, valid)
        coarse, fine = cumulative_decays(log_decays)
        zeta = tl.exp(coarse + fine)
        weight = decay_mask(coarse, fine, places) * (write * write * size * size)[None, :]
        of_keys = tl.sum((zeta * p)[:, None] * (weight / f[:, None]), 0)
        store_gate(p_t, p, row, G, j, valid)
        store_gate(fro, f, row, G, j, valid)
        store_gate(start_h, x_h_y, row, G, j, valid)
        store_gate(key_weight, of_keys, row, G, j, valid)
        tl.store(start_weight + mh, tl.sum(zeta * p * (zeta * h_scale / f), 0))
        solution += load_rows(dq, row, H, h, K, rk, valid)
        store_rows(dq, solution, row, H, h, K, rk, valid)
    else:
        store_scaled(x, x_scale, solution, row, H, h, K, rk, valid)


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
    u_states,  # [M, G, K, V] OP
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
        un = load_state(u_states + mh * K * V, rk, rv, K, V)
        past = tl.dot(zn, un, input_precision=PREC)
        past *= (zeta * tl.load(u_scales + mh * NV + block))[:, None]
        vn, v_max = operand(load_rows(v, row, HV, h // GV, V, rv, valid), OP)
        now = tl.dot(pn, vn, input_precision=PREC) * (p_max * v_max * k_max)
        store_rows(o, (past + now) * (scale * z_max), row, H, h, V, rv, valid)
