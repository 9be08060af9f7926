"""Conjugate gradients that stop where their own residual proves the error (gka/maths/solvers/cg.py).

The proof is in docs/numerics.md. A row is proven when |r|^2 <= stop x.(q + r), where x.(q + r) is the sum of
the steps' s |r|^2, and then stands still. r = q - A x is not computed anew at the end: a residual of the
operands' rounding proves no more than the updated one.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import add_product
from gka.maths.solvers import cg

LEAST_UNIT: tl.constexpr = tl.constexpr(cg.LEAST_UNIT)
LARGEST_SIZE: tl.constexpr = tl.constexpr(cg.LARGEST_SIZE)
LEAST_CURVATURE: tl.constexpr = tl.constexpr(cg.LEAST_CURVATURE)
LARGEST_ENTRY: tl.constexpr = tl.constexpr(cg.LARGEST_ENTRY)


@triton.jit
def unit_and_entry(ridge_ratio):
    """The unit of A d, relative to F, and the size to which the right-hand sides' largest entries are scaled.

    d stays below |q| / a and its products with keys, over the unit, below float16's limit; the last d lies
    far above float16's smallest number.
    """
    unit = tl.maximum(ridge_ratio, LEAST_UNIT)
    return unit, tl.minimum(2.0, 100.0 * unit)


@triton.jit
def goes_on(size, energy, stop):
    """Whether |r|^2 = size proves nothing yet; false for NaN, which one step has spread over the row."""
    return (size > stop * energy) & (size < LARGEST_SIZE)


@triton.jit
def has_direction(d_a_d, d, size, GUARDED: tl.constexpr):
    """Whether rounding has left d a direction. NaN goes on, unless (GUARDED) products have overflowed."""
    if GUARDED:
        lost = ~(tl.abs(d_a_d) < float("inf")) & (size < LARGEST_SIZE)
        return ~((d_a_d < LEAST_CURVATURE * tl.sum(d * d, 1)) | lost)
    return ~(d_a_d <= 0.0)


@triton.jit
def next_direction(residual, keep, d, working, GUARDED: tl.constexpr):
    """r + keep d; GUARDED: finite whatever r is, and 0 in rows that have ended."""
    d = residual + keep[:, None] * d
    if GUARDED:
        d = tl.minimum(tl.maximum(d, -LARGEST_ENTRY), LARGEST_ENTRY)
        d = tl.where(working[:, None], d, 0.0)
    return d


@triton.jit
def weighted_scores(d, kt, weight, PREC: tl.constexpr):
    """(d_t . k_j) W_tj in the operands' dtype, which is W's."""
    scores = tl.dot(d, kt, input_precision=PREC) * weight.to(tl.float32)
    return scores.to(weight.dtype)


@triton.jit
def conjugate_gradients(
    rhs, kn, hn, h_ptr, h_coef, weight, ridge_ratio, unit, stop, most, K: tl.constexpr,
    TILED: tl.constexpr, GUARDED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x of (A_t / F_t) x_t = rhs_t for the rows of a chunk, and the steps of its slowest row.

    rhs [C, BK] float32, rows of the size that `unit_and_entry` has; kn [C, BK], hn [BK, BK] in OP (TILED: at
    h_ptr); h_coef [C] and weight [C, C] carry 1/(F_t unit). d is rounded to OP before it enters x, the
    residual and d.A d alike, so its rounding costs no accuracy. A row that is done has step length 0.
    GUARDED: OP is float16 and the ridge so small that products may overflow, which ends the row.
    """
    residual = rhs
    d = rhs.to(OP)
    x = tl.zeros(rhs.shape, tl.float32)
    size = tl.sum(rhs * rhs, 1)
    energy = tl.zeros(size.shape, tl.float32)
    working = size != 0.0  # NaN too
    kt = tl.trans(kn)
    weight = weight.to(OP)
    steps = 0
    left = tl.max(working.to(tl.int32), 0)
    while (left > 0) & (steps < most):
        d32 = d.to(tl.float32)
        # an address that depends on the step: the compiler must not hoist the tiles, which would not fit
        again = h_ptr + steps // 1073741824
        a_d = tl.zeros(rhs.shape, tl.float32)
        if TILED:  # scores beside the quarters of H outgrow a small chip's shared memory
            a_d = add_product(a_d, d, hn, again, K, TILED, False, PREC) * h_coef[:, None]
            scores = weighted_scores(d, kt, weight, PREC)
        else:  # a_d beside the sums of scores takes more registers
            scores = weighted_scores(d, kt, weight, PREC)
            a_d = add_product(a_d, d, hn, again, K, TILED, False, PREC) * h_coef[:, None]
        a_d = tl.dot(scores, kn, a_d, input_precision=PREC)
        a_d += (ridge_ratio / unit) * d32
        d_a_d = unit * tl.sum(d32 * a_d, 1)
        working = working & has_direction(d_a_d, d32, size, GUARDED)
        length = tl.where(working, size, 0.0) / tl.where(working, d_a_d, 1.0)
        energy += length * size
        x += length[:, None] * d32
        residual -= (unit * length)[:, None] * a_d
        before = size
        size = tl.sum(residual * residual, 1)
        working = working & goes_on(size, energy, stop)
        keep = tl.where(working, size, 0.0) / tl.where(working, before, 1.0)
        d = next_direction(residual, keep, d32, working, GUARDED).to(OP)
        left = tl.max(working.to(tl.int32), 0)
        steps += 1
    return x, steps


@triton.jit
def solve_state(h, q, fro, ridge_ratio, stop, most):
    """x of (h + a F) x = q for one q and a state with |h| = fro > 0, all float32."""
    largest = tl.max(tl.abs(q), 0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    inverse = 1.0 / fro
    r = q / largest
    d = r
    x = tl.zeros_like(r)
    size = tl.sum(r * r, 0)
    energy = 0.0
    working = (size != 0.0).to(tl.int32)  # NaN too
    steps = 0
    while (working > 0) & (steps < most):
        a_d = tl.sum(h * d[None, :], 1) * inverse + ridge_ratio * d
        length = size / tl.sum(d * a_d, 0)
        energy += length * size
        x += length * d
        r -= length * a_d
        before = size
        size = tl.sum(r * r, 0)
        working = goes_on(size, energy, stop).to(tl.int32)
        d = r + (size / before) * d
        steps += 1
    return x * (inverse * largest)
