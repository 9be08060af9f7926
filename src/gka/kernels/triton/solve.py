"""Ridge and solve of one chunk of one head: F_t, the iteration on the tensor cores, x_t."""

import triton
import triton.language as tl

from gka.kernels.triton.cg import conjugate_gradients, unit_and_entry
from gka.kernels.triton.common import (
    add_product,
    cumulative_decays,
    decay_mask,
    key_operand,
    load_decay,
    load_gate,
    load_raw,
    load_rows,
    load_scaled,
    load_state,
    store_gate,
    store_rows,
    store_scaled,
    sum_blocks,
)


@triton.jit
def chunk_system(
    kn, hn, h_ptr, h_scale, h_norm2, zeta, weight, K: tl.constexpr, TILED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """F_t^2 and its parts, for keys kn and weights that carry the keys' scale.

    Returns s_j = k_j^T H_[c] k_j, (W (K K^T)^2)_tj, F_t^2.
    """
    kh = tl.zeros(kn.shape, tl.float32)
    kh = add_product(kh, kn, hn, h_ptr, K, TILED, False, PREC) * h_scale
    energies = tl.sum(kh * kn.to(tl.float32), 1)
    gram = tl.dot(kn, tl.trans(kn), input_precision=PREC)
    pair = tl.dot(weight, gram * gram, input_precision=PREC)
    fro2 = zeta * zeta * h_norm2 + tl.sum(
        weight * (2.0 * zeta[:, None] * energies[None, :] + pair), 1
    )
    return energies, pair, fro2


@triton.jit
def without(residual, w_ptr, tau, heads, valid, K: tl.constexpr):
    """(1 - tau_t w_t w_t^T) r_t of every row, with w [C, heads, K] at w_ptr; r_t itself if tau is None."""
    if tau is not None:
        columns = tl.arange(0, residual.shape[1])
        w = load_raw(w_ptr, 0, heads, 0, K, columns, valid).to(tl.float32)
        residual -= (tau * tl.sum(residual * w, 1))[:, None] * w
    return residual


@triton.jit
def chebyshev(
    rhs, kn, hn, h_ptr, h_coef, weight, lamb, rho2, num_iter, w_ptr, tau, w_heads, valid,
    K: tl.constexpr, TILED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x of B_t x_t = rhs_t, B_t = 2/(L + mu) (H_t + lambda_t I), in the residual form.

    rhs [C, BK] float32 of size about one; kn [C, BK], hn [BK, BK] in OP (TILED: at h_ptr); h_coef [C] and
    weight [C, C] carry 2/(L + mu); lamb = 2a/(1 + 2a). The update d is rounded to OP before it
    enters both x and the residual, so its rounding costs no accuracy. If tau is not None, d is updated
    by (1 - tau_t w_t w_t^T) r_t instead of r_t, and 2/((kappa + 1) lambda) replaces 2/(L + mu).
    """
    residual = rhs
    d = without(rhs, w_ptr, tau, w_heads, valid, K).to(OP)
    x = d.to(tl.float32)
    kt = tl.trans(kn)
    minus_weight = (-weight).to(OP)
    omega = 2.0
    for i in range(num_iter):
        omega = 4.0 / (4.0 - rho2 * omega)
        d32 = d.to(tl.float32)
        scaled = (d32 * (-h_coef)[:, None]).to(OP)
        # an address that depends on i: the compiler must not hoist the tiles, which would not fit
        again = h_ptr + i // 1073741824
        residual = add_product(residual, scaled, hn, again, K, TILED, False, PREC)
        scores = tl.dot(d, kt, input_precision=PREC) * minus_weight.to(tl.float32)
        residual = tl.dot(scores.to(OP), kn, residual, input_precision=PREC)
        residual -= lamb * d32
        w_again = None if tau is None else w_ptr + i // 1073741824
        z = without(residual, w_again, tau, w_heads, valid, K)
        d = ((omega - 1.0) * d32 + omega * z).to(OP)
        x += d.to(tl.float32)
    return x


@triton.jit
def solve_kernel(
    rhs,  # [tokens, H, K]: q; with ADJOINT dx [tokens, G, K], rows divided by rhs_scale
    rhs_scale,  # [tokens, G] float32 or None
    k,  # [tokens, HK, K]
    gk,  # [tokens, H] or None: decay of H
    beta,  # [tokens, H] or None
    h_start,  # [M, G, K, K] OP
    h_scales,  # [M, G, NK] float32
    h_norms,  # [M, G, NK] float32
    x,  # the solutions, like rhs: rows divided by x_scale; may be rhs itself
    x_scale,  # [tokens, H] float32, or [tokens, G] with ADJOINT
    # only in the backward pass (ADJOINT), where x above is y:
    forward_x,  # [tokens, H, K]
    forward_scale,  # [tokens, H]
    dq,  # [tokens, H, K]: y is added to it
    p_t,  # [tokens, G] float32: p_t = 2 a <x_t, y_t>; p_t / F_t could overflow
    fro,  # [tokens, G] float32: F_t
    start_h,  # [tokens, G] float32: x_t^T H_[c] y_t
    key_weight,  # [tokens, G] float32: sum_t zeta_t p_t W_tj s_j^2 / F_t, s_j of key_operand
    start_weight,  # [M, G] float32: sum_t zeta_t^2 p_t / F_t times h_scales
    # only with the adaptive solver, written by certify_kernel:
    nystroem,  # [tokens, G, K] OP: w_t
    tau,  # [tokens, G] float32
    phi,  # [M, G] float32
    steps,  # [M, G] int32; with conjugate gradients written here, else None
    chunk_start,
    chunk_len,
    ridge_ratio,
    num_iter,
    empty_below,
    stop,  # of conjugate gradients, of which num_iter is the largest number of steps; else None
    base,  # first head of the G heads
    G,
    H,
    HK: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    C: tl.constexpr,
    TILED: tl.constexpr,  # read H_[c] in quarters at each use
    ADJOINT: tl.constexpr,
    PART: tl.constexpr,  # the chunks that are solved: "all", "plain" or "deflated"
    GUARDED: tl.constexpr,  # of conjugate gradients
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """x_t of A_t x_t = rhs_t for one chunk of one head: ridge and solve.

    The adaptive solver launches it twice: for the chunks that run plain, and for those with N_t.
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
    h_ptr = h_start + mh * K * K
    hn = None if TILED else load_state(h_ptr, rk, rk, K, K)
    h_scale = tl.load(h_scales + mh * NK)
    h_norm2 = sum_blocks(h_norms, mh, NK)
    _, _, fro2 = chunk_system(
        kn, hn, h_ptr, h_scale, h_norm2, zeta, weight, K, TILED, PREC
    )  # fmt: skip
    empty = fro2 < empty_below * empty_below
    f = tl.sqrt(tl.where(empty, 1.0, fro2))
    if ADJOINT:
        right = load_scaled(rhs, rhs_scale, row, G, j, K, rk, valid)
    else:
        right = load_rows(rhs, row, H, h, K, rk, valid)
    largest = tl.max(tl.abs(right), 1)
    largest = tl.where(largest > 0.0, largest, 1.0)
    right = tl.where(empty[:, None], 0.0, right / largest[:, None])
    if stop is not None:
        unit, entry = unit_and_entry(ridge_ratio)
        per_unit = 1.0 / (f * unit)
        solution, count = conjugate_gradients(
            right * entry, kn, hn, h_ptr, zeta * h_scale * per_unit, weight * per_unit[:, None],
            ridge_ratio, unit, stop, num_iter, K, TILED, GUARDED, OP, PREC,
        )  # fmt: skip
        tl.store(steps + mh, count)
        solution *= (largest / (f * entry))[:, None]
    else:
        top = tl.load(phi + mh) if PART == "deflated" else 1.0  # (kappa - 1) a
        rho = 1.0 / (top + 2.0 * ridge_ratio)
        unit = 2.0 * rho / f  # 2/(L + mu), and 2/((kappa + 1) lambda) with N_t
        w_ptr, taken = None, None
        if PART == "deflated":
            w_ptr = nystroem + (row * G + j) * K
            taken = load_gate(tau, row, G, j, valid, 0.0)
            num_iter = count
        solution = chebyshev(
            right, kn, hn, h_ptr, zeta * h_scale * unit, weight * unit[:, None],
            2.0 * ridge_ratio * rho, rho * rho * top * top, num_iter, w_ptr, taken, G, valid,
            K, TILED, OP, PREC,
        )  # fmt: skip
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
