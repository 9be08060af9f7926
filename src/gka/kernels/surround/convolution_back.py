"""Gradients of the short convolutions (`convolution`): of inputs, and of weights.

A program takes several segments through a tile of channels, token by token, as the convolution itself does.
"""

import triton
import triton.language as tl

from gka.kernels.surround.convolution import (
    EPS,
    filtered,
    load_ahead,
    load_token,
    load_weights,
    load_window,
    reciprocal,
    seen_ahead,
    seen_later,
    seen_now,
    segments_of,
    shifted,
    silu,
    store_token,
    where_seen,
)
from gka.kernels.triton.common import divides


@triton.jit
def through_unit(y, du):
    """The gradient of y from that of unit_rows(y)."""
    norm = tl.sqrt(tl.sum(y * y, 1))
    inverse = reciprocal(norm + EPS)
    # below 1e-18 the second term vanishes beside the first
    along = tl.sum(y * du, 1) * (inverse * inverse) * reciprocal(tl.maximum(norm, 1e-18))
    return du * inverse[:, None] - y * along[:, None]


@triton.jit
def through_silu(
    window, weights, do, seen, W: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr
):
    """dz of the newest of W tokens from the gradient of its output."""
    z = filtered(window, weights, seen, W, PACKED)
    y, slope = silu(z)
    if UNIT:
        do = through_unit(y, do)
    return do * slope


@triton.jit
def spread(pending, weights, dz, seen, W: tl.constexpr, PACKED: tl.constexpr):
    """dx of the last W tokens, the oldest complete, from `pending` of the last W - 1 before this one."""
    added = ()
    for i in tl.static_range(W - 1):
        added = added + (pending[i] + weights[i] * where_seen(dz, seen, W - 1 - i, PACKED),)
    return added + (weights[W - 1] * dz,)


@triton.jit
def through_tile(
    x, w, state, dy, dx, partial, past, lengths, b, block, tile, first, place, T, L,
    C: tl.constexpr, D: tl.constexpr, CALL: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx of R segments of L tokens of a tile of channels, and their part of dw.

    Registers hold the window of inputs that z needs, and dx of the last tokens, to which later ones still
    add: so W - 1 more steps follow a segment's end.
    """
    WHOLE: tl.constexpr = divides(D, C) and divides(BD, D)
    PACKED: tl.constexpr = past is not None
    channels, inside, at, left, start, offsets = segments_of(b, block, tile, T, L, C, D, R, BD)
    from_x, from_dy = x + start + offsets, dy + start + offsets
    weights = load_weights(w, channels, inside, W)
    window = load_window(from_x, state, b, at, left, channels, inside, C, W, WHOLE)
    coming_x = load_ahead(from_x, left, inside, AHEAD, C, WHOLE)
    coming_dy = load_ahead(from_dy, left, inside, AHEAD, C, WHOLE)
    coming_seen = seen_ahead(past, at, left, AHEAD)
    needed = tl.minimum(left, L + W - 1)
    counted = left  # tokens whose dy counts
    if lengths is not None:
        counted = tl.load(lengths + b).to(tl.int32) - at
    zero = tl.zeros((R, BD), tl.float32)
    pending, sums = (), ()
    for i in tl.static_range(W):
        sums = sums + (zero,)
        if i > 0:
            pending = pending + (zero,)
    for first_step in range(0, L, UNROLL):
        for ahead in tl.static_range(UNROLL):
            step = first_step + ahead
            full, do = window + (coming_x[0].to(tl.float32),), coming_dy[0].to(tl.float32)
            later = step + AHEAD
            exists = needed > later
            coming_x = shifted(coming_x, load_token(from_x, later, exists, inside, C, WHOLE))
            coming_dy = shifted(coming_dy, load_token(from_dy, later, exists, inside, C, WHOLE))
            if lengths is not None:
                do = tl.where((counted > step)[:, None], do, 0.0)
            seen = seen_now(coming_seen, past, at)
            coming_seen = seen_later(coming_seen, past, at + later, exists)
            dz = through_silu(full, weights, do, seen, W, PACKED, UNIT)
            if partial is not None:
                summed = ()
                for i in tl.static_range(W):
                    summed = summed + (sums[i] + where_seen(dz, seen, W - 1 - i, PACKED) * full[i],)
                sums = summed
            added = spread(pending, weights, dz, seen, W, PACKED)
            window, pending = full[1:], added[1:]
            if dx is not None:
                done = step - (W - 1)
                complete = (left > done) & (at * 0 + done >= 0)
                store_token(dx + start + offsets, added[0], done, complete, inside, C, WHOLE)
    if dx is not None:
        for more in tl.static_range(W - 1):
            step = L + more
            full, do = window + (coming_x[0].to(tl.float32),), coming_dy[0].to(tl.float32)
            seen = seen_now(coming_seen, past, at)
            if more + AHEAD < W - 1:
                later = step + AHEAD
                exists = left > later
                coming_x = shifted(coming_x, load_token(from_x, later, exists, inside, C, WHOLE))
                coming_dy = shifted(coming_dy, load_token(from_dy, later, exists, inside, C, WHOLE))
                coming_seen = seen_later(coming_seen, past, at + later, exists)
            else:
                coming_x, coming_dy = coming_x[1:], coming_dy[1:]
                if past is not None:
                    coming_seen = coming_seen[1:]
            if lengths is not None:
                do = tl.where((counted > step)[:, None], do, 0.0)
            dz = through_silu(full, weights, do, seen, W, PACKED, UNIT)
            added = spread(pending, weights, dz, seen, W, PACKED)
            window, pending = full[1:], added[1:]
            done = step - (W - 1)
            store_token(dx + start + offsets, added[0], done, left > done, inside, C, WHOLE)
    if partial is not None:
        to = partial + (place.to(tl.int64) * CALL + first) * W
        for i in tl.static_range(W):
            tl.store(to + channels * W + i, tl.sum(sums[i], 0), mask=inside)


@triton.jit(do_not_specialize=["T", "L", "blocks"])
def convolution_backward_kernel(
    xq, xk, xv, wq, wk, wv, sq, sk, sv, dyq, dyk, dyv, dxq, dxk, dxv, partial, past, lengths,
    T, L, blocks,
    CQ: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    SEGMENTS: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of convolution_kernel's inputs, and each place's part of its weights' gradients.

    Args:
        dyq, dyk, dyv: gradients of the outputs; dxq, dxk, dxv: of the inputs, or None.
        partial: [places, CQ + CK + CV, W] float32, to be summed over places; or None.
    """
    NQ: tl.constexpr = CQ // DK
    NK: tl.constexpr = CK // DK
    NV: tl.constexpr = (CV + DV - 1) // DV
    CALL: tl.constexpr = CQ + CK + CV
    program = tl.program_id(0)
    tile, place = program % (NQ + NK + NV), program // (NQ + NK + NV)
    b, block = place // blocks, place % blocks
    if tile < NQ:
        through_tile(
            xq, wq, sq, dyq, dxq, partial, past, None, b, block, tile, 0, place, T,
            L * (SEGMENTS // RK), CQ, DK, CALL, W, True, RK, BK, AHEAD, UNROLL,
        )  # fmt: skip
    elif tile < NQ + NK:
        tile -= NQ
        through_tile(
            xk, wk, sk, dyk, dxk, partial, past, lengths, b, block, tile, CQ, place, T,
            L * (SEGMENTS // RK), CK, DK, CALL, W, True, RK, BK, AHEAD, UNROLL,
        )  # fmt: skip
    else:
        if CV > 0:
            tile -= NQ + NK
            through_tile(
                xv, wv, sv, dyv, dxv, partial, past, None, b, block, tile, CQ + CK, place, T,
                L * (SEGMENTS // RV), CV, DV, CALL, W, False, RV, BV, AHEAD, UNROLL,
            )  # fmt: skip


@triton.jit
def sum_columns(
    partial, dw, tile, first, places, CALL, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr
):
    """BN columns of one weight's gradient [N], from partial sums [places, CALL] at column `first`."""
    rows, cols = tl.arange(0, BP), tile * BN + tl.arange(0, BN)
    total = tl.zeros((BP, BN), tl.float32)
    for begin in range(0, places, BP):
        at = begin + rows
        mask = (at < places)[:, None] & (cols < N)[None, :]
        total += tl.load(
            partial + at.to(tl.int64)[:, None] * CALL + (first + cols)[None, :],
            mask=mask,
            other=0.0,
        )
    tl.store(dw + cols, tl.sum(total, 0).to(dw.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["places"])
def sum_places_kernel(
    partial, dwq, dwk, dwv, places, NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The weights' gradients from convolution_backward_kernel's `partial`; NQ, NK, NV: numbers of each."""
    TQ: tl.constexpr = (NQ + BN - 1) // BN
    TK: tl.constexpr = (NK + BN - 1) // BN
    CALL: tl.constexpr = NQ + NK + NV
    tile = tl.program_id(0)
    if tile < TQ:
        sum_columns(partial, dwq, tile, 0, places, CALL, NQ, BP, BN)
    elif tile < TQ + TK:
        sum_columns(partial, dwk, tile - TQ, NQ, places, CALL, NK, BP, BN)
    else:
        if NV > 0:
            sum_columns(partial, dwv, tile - TQ - TK, NQ + NK, places, CALL, NV, BP, BN)
