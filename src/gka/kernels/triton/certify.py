"""The adaptive solver's certificate: the rank-one Nystroem part N_t of every H_t, and the steps of a chunk.

`gka.maths.solvers.adaptive` has the formulas. All quantities are relative to F_t. H_[c] and the keys are
the solve's operands, rounded to OP.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import (
    add_product,
    cumulative_decays,
    decay_mask,
    inverse,
    key_operand,
    load_decay,
    load_gate,
    load_rows,
    load_state,
    store_gate,
    store_rows,
    sum_blocks,
)
from gka.kernels.triton.solve import chunk_system
from gka.maths.solvers import adaptive

THETA_FLOOR: tl.constexpr = tl.constexpr(adaptive.THETA_FLOOR)
WORTHWHILE: tl.constexpr = tl.constexpr(adaptive.WORTHWHILE[0])
WORTHWHILE_OF: tl.constexpr = tl.constexpr(adaptive.WORTHWHILE[1])
SMALL: tl.constexpr = tl.constexpr(1e-30)


@triton.jit
def arcosh_1p(x):
    """acosh(1 + x), accurate for small x too: log(1 + y), corrected for the rounding of 1 + y (Kahan)."""
    y = x + tl.sqrt(x * (x + 2.0))
    rounded = 1.0 + y
    return tl.where(rounded > 1.0, tl.log(rounded) * (y / (rounded - 1.0)), y)


@triton.jit
def unit_vector(v, OP: tl.constexpr):
    """v / |v| rounded to OP, as float32; zero for v = 0."""
    norm2 = tl.sum(v * v, 0)
    v *= tl.where(norm2 > SMALL, 1.0 / tl.sqrt(tl.where(norm2 > SMALL, norm2, 1.0)), 0.0)
    return v.to(OP).to(tl.float32)


@triton.jit
def state_times(v, kn, hn, h_ptr, K: tl.constexpr, TILED: tl.constexpr, PREC: tl.constexpr):
    """H v of the stored H, for v rounded to OP: the product of C equal rows, whose mean is exact."""
    C: tl.constexpr = kn.shape[0]
    rows = tl.broadcast_to(v[None, :], kn.shape).to(kn.dtype)
    y = add_product(tl.zeros(kn.shape, tl.float32), rows, hn, h_ptr, K, TILED, False, PREC)
    return tl.sum(y, 0) / C


@triton.jit
def leading_vector(
    kn, hn, h_ptr, diagonal, start, keys, rk, K: tl.constexpr, TILED: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """v [BK]: two power steps on S = mean_t H_t / F_t from the unit vector e_i of its largest S_ii."""
    k32 = kn.to(tl.float32)
    first = tl.argmax(start * diagonal + tl.sum(keys[:, None] * k32 * k32, 0), 0)
    column = tl.load(h_ptr + first * K + rk, mask=rk < K, other=0.0).to(tl.float32)
    k_v = tl.sum(tl.where((rk == first)[None, :], k32, 0.0), 1)
    v = unit_vector(start * column + tl.sum((keys * k_v)[:, None] * k32, 0), OP)
    k_v = tl.sum(k32 * v[None, :], 1)
    h_v = state_times(v, kn, hn, h_ptr, K, TILED, PREC)
    return unit_vector(start * h_v + tl.sum((keys * k_v)[:, None] * k32, 0), OP)


@triton.jit
def largest_remainder(trace, rayleigh, strength, empty, operands, K: tl.constexpr):
    """phi: the chunk's largest bound of |H_t - N_t|_2 / F_t (trace and Frobenius norm); 0 without history."""
    arithmetic: tl.constexpr = K * 2.0**-21  # 8 K u
    mean = (trace - strength) * (1.0 / K)
    squared = 1.0 - 2.0 * strength * rayleigh + strength * strength
    rest = squared - K * mean * mean
    spread = (1.0 - 1.0 / K) * tl.where(rest > 0.0, rest, 0.0) + arithmetic
    phi = mean + tl.sqrt(spread) + arithmetic + operands
    phi *= 1.0 + 2.0 * operands  # the solve's F_t, of tf32 products, may be smaller by this
    return tl.minimum(tl.max(tl.where(empty, 0.0, phi), 0), 1.0)


@triton.jit
def fewest_steps(phi, ridge_ratio, num_iter):
    """Fewest n with 1/T_{n+1}(1 + 2a/phi) <= 1/T_{r+1}(1 + 2a)."""
    plain = arcosh_1p(2.0 * ridge_ratio)
    ratio = plain / arcosh_1p(2.0 * ridge_ratio / tl.maximum(phi, 1e-6))
    n = tl.ceil((num_iter + 1.0) * ratio).to(tl.int32) - 1
    return tl.where(phi > 0.0, tl.maximum(n, 0), 0)


@triton.jit
def certify_kernel(
    k,  # [tokens, HK, K]
    gk,  # [tokens, H] or None: decay of H
    beta,  # [tokens, H] or None
    h_start,  # [M, G, K, K] OP
    h_scales,  # [M, G, NK] float32
    h_norms,  # [M, G, NK] float32
    w,  # [tokens, G, K] OP: N_t = strength_t F_t w_t w_t^T / |w_t|^2
    tau,  # [tokens, G] float32: P_t^-1 = (1 - tau_t w_t w_t^T) / lambda_t
    phi,  # [M, G] float32
    steps,  # [M, G] int32: num_iter for a chunk with plain steps
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
    TILED: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Preconditioner, spectrum and steps of one chunk of one head."""
    m, j = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    mh, h = m * G + j, base + j
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
    # F_t^2 in full float32: the terms that cancel against it below are float32
    _, _, fro2 = chunk_system(
        kn, hn, h_ptr, h_scale, h_norm2, zeta, weight, K, TILED, "tf32x3"
    )  # fmt: skip
    empty = fro2 < empty_below * empty_below
    per_f = 1.0 / tl.sqrt(tl.where(empty, 1.0, fro2))
    weight *= per_f[:, None]
    past = zeta * h_scale * per_f
    diagonal = tl.load(h_ptr + rk * (K + 1), mask=rk < K, other=0.0).to(tl.float32)
    start, keys = tl.sum(past, 0) / C, tl.sum(weight, 0) / C
    v = leading_vector(kn, hn, h_ptr, diagonal, start, keys, rk, K, TILED, OP, PREC)
    h_v = state_times(v, kn, hn, h_ptr, K, TILED, PREC)
    # u_t = H_t v / F_t; each row of the product's left operand is scaled to at most one
    k32 = kn.to(tl.float32)
    left = weight * tl.sum(k32 * v[None, :], 1)[None, :]
    largest = tl.max(tl.abs(left), 1)
    u = tl.dot((left * inverse(largest)[:, None]).to(OP), kn, input_precision=PREC)
    u = u * largest[:, None] + past[:, None] * h_v[None, :]
    operands: tl.constexpr = 2.0**-23 if tl.float32 == OP else 2.0**-10  # twice the unit roundoff
    slack: tl.constexpr = 1.0 + K * 2.0**-21 + operands
    theta, norm2 = tl.sum(u * v[None, :], 1), tl.sum(u * u, 1)
    strength = norm2 / (slack * tl.where(theta > 0.0, theta, 0.0) + THETA_FLOOR)
    found = norm2 > SMALL
    u *= tl.where(found, 1.0 / tl.sqrt(tl.where(found, norm2, 1.0)), 0.0)[:, None]
    unit = u.to(OP)
    u = unit.to(tl.float32)
    per_norm2 = inverse(tl.sum(u * u, 1))  # 1, but for the rounding of `unit`
    along = tl.dot(unit, tl.trans(kn), input_precision=PREC)
    h_w = add_product(tl.zeros(u.shape, tl.float32), unit, hn, h_ptr, K, TILED, False, PREC)
    rayleigh = past * tl.sum(h_w * u, 1) + tl.sum(weight * along * along, 1)
    trace = past * tl.sum(diagonal, 0) + tl.sum(weight * tl.sum(k32 * k32, 1)[None, :], 1)
    most = largest_remainder(trace, rayleigh * per_norm2, strength, empty, operands, K)
    n = fewest_steps(most, ridge_ratio, num_iter)
    plain = WORTHWHILE_OF * n > WORTHWHILE * num_iter  # a step with N_t costs about a sixth more
    tl.store(phi + mh, tl.where(plain, 1.0, most))
    tl.store(steps + mh, tl.where(plain, num_iter, n))
    store_gate(tau, strength / (ridge_ratio + strength) * per_norm2, row, G, j, valid)
    store_rows(w, unit, row, G, j, K, rk, valid)
