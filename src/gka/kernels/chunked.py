"""The forward kernels of one chunk of one head: ridge and solve, then mix and readout."""

import triton
import triton.language as tl

from gka.kernels.chebyshev import chebyshev
from gka.kernels.common import decay_mask, load_gate, load_mix, load_rows, operand, store_rows
from gka.kernels.ridge import chunk_system


@triton.jit
def sum_blocks(ptr, index, N: tl.constexpr):
    """Sum of N consecutive numbers."""
    total = 0.0
    for i in tl.static_range(N):
        total += tl.load(ptr + index * N + i)
    return total


@triton.jit
def column_scales(ptr, index, cols, V: tl.constexpr, SB: tl.constexpr):
    """The scale of each column of a stored U_[c]; one for every SB columns."""
    return tl.load(ptr + index * ((V + SB - 1) // SB) + cols // SB, mask=cols < V, other=0.0)


@triton.jit
def solve_kernel(
    rhs,  # [tokens, H, K]: q, or in the derivative dx
    k,  # [tokens, HK, K]
    gk,  # [tokens, H] or None: decay of H
    beta,  # [tokens, H] or None
    h_states,  # [M, H, K, K] OP
    h_scales,  # [M, H, NK] float32
    h_norms,  # [M, H, NK] float32
    x,  # [tokens, H, K]: the solutions; may be rhs itself
    # only in the derivative (ADJOINT), where x above is y:
    forward_x,  # [tokens, H, K]
    dq,  # [tokens, H, K]: y is added to it
    w_t,  # [tokens, H] float32: w_t = 2 a <x_t, y_t> / F_t
    key_weight,  # [tokens, H] float32: sum_t zeta_t w_t W_tj
    start_weight,  # [M, H] float32: sum_t zeta_t^2 w_t
    chunk_start,
    chunk_len,
    ridge_ratio,
    num_iter,
    empty_below,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    C: tl.constexpr,
    ADJOINT: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """x_t = p_r(A_t) rhs_t for one chunk of one head: ridge and solve."""
    m, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    mh = m * H + h
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m) + places
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    square = rk[:, None] * K + rk[None, :]
    in_square = (rk[:, None] < K) & (rk[None, :] < K)
    write = load_gate(beta, row, H, h, valid, 1.0)
    kn, k_max = operand(load_rows(k, row, HK, h // GK, K, rk, valid), OP)
    b = tl.cumsum(load_gate(gk, row, H, h, valid, 0.0), 0)
    zeta = tl.exp(b)
    weight = decay_mask(b, places) * (write * write * k_max * k_max)[None, :]
    hn = tl.load(h_states + mh * K * K + square, mask=in_square, other=0.0)
    h_scale = tl.load(h_scales + mh * NK)
    h_norm2 = sum_blocks(h_norms, mh, NK)
    _, _, fro2 = chunk_system(kn, hn, h_scale, h_norm2, zeta, weight, PREC)
    empty = fro2 < empty_below * empty_below
    f = tl.sqrt(tl.where(empty, 1.0, fro2))
    rho = 1.0 / (1.0 + 2.0 * ridge_ratio)
    unit = 2.0 * rho / f  # 2/(L + mu)
    right = load_rows(rhs, row, H, h, K, rk, valid)
    largest = tl.max(tl.abs(right), 1)
    largest = tl.where(largest > 0.0, largest, 1.0)
    solution = chebyshev(
        tl.where(empty[:, None], 0.0, right / largest[:, None]),
        kn,
        hn,
        zeta * h_scale * unit,
        weight * unit[:, None],
        2.0 * ridge_ratio * rho,
        rho * rho,
        num_iter,
        OP,
        PREC,
    )
    solution *= (unit * largest)[:, None]
    store_rows(x, solution, row, H, h, K, rk, valid)
    if ADJOINT:
        w = tl.sum(load_rows(forward_x, row, H, h, K, rk, valid) * solution, 1)
        w = tl.where(empty, 0.0, 2.0 * ridge_ratio * w / f)
        write = load_gate(beta, row, H, h, valid, 1.0)
        b = tl.cumsum(load_gate(gk, row, H, h, valid, 0.0), 0)
        zeta = tl.exp(b)
        of_keys = tl.sum((zeta * w)[:, None] * decay_mask(b, places), 0) * write * write
        tl.store(w_t + row * H + h, w, mask=valid)
        tl.store(key_weight + row * H + h, of_keys, mask=valid)
        tl.store(start_weight + mh, tl.sum(zeta * zeta * w, 0))
        solution += load_rows(dq, row, H, h, K, rk, valid)
        store_rows(dq, solution, row, H, h, K, rk, valid)


@triton.jit
def readout_kernel(
    q,  # [tokens, H, K]
    x,  # [tokens, H, K] or None without a solve
    k,  # [tokens, HK, K]
    v,  # [tokens, HV, V]
    g,  # [tokens, H] or None: decay of U
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    u_states,  # [M, H, K, V] OP
    u_scales,  # [M, H, V / SB] float32
    o,  # [tokens, H, V]
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
    """o_t = scale U_t^T z_t for one chunk of one head: mix and readout."""
    m, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    mh = m * H + h
    places = tl.arange(0, C)
    row = tl.load(chunk_start + m) + places
    valid = places < tl.load(chunk_len + m)
    rk = tl.arange(0, BK)
    write = load_gate(beta, row, H, h, valid, 1.0)
    kn, k_max = operand(load_rows(k, row, HK, h // GK, K, rk, valid), OP)
    z = load_mix(q, x, alpha, row, H, h, K, rk, valid)
    zn, z_max = operand(z, OP)
    b = tl.cumsum(load_gate(g, row, H, h, valid, 0.0), 0)
    zeta = tl.exp(b)
    weight = decay_mask(b, places) * (write * write)[None, :]
    pn, p_max = operand(tl.dot(zn, tl.trans(kn), input_precision=PREC) * weight, OP)
    for block in tl.static_range(NV):
        rv = block * BV + tl.arange(0, BV)
        tile = rk[:, None] * V + rv[None, :]
        inside = (rk[:, None] < K) & (rv[None, :] < V)
        un = tl.load(u_states + mh * K * V + tile, mask=inside, other=0.0)
        past = tl.dot(zn, un, input_precision=PREC)
        past *= zeta[:, None] * column_scales(u_scales, mh, rv, V, SB)[None, :]
        vn, v_max = operand(load_rows(v, row, HV, h // GV, V, rv, valid), OP)
        now = tl.dot(pn, vn, input_precision=PREC) * (p_max * v_max * k_max)
        store_rows(o, (past + now) * (scale * z_max), row, H, h, V, rv, valid)
