"""Short causal depthwise convolution, SiLU and the unit norm of a head, forward and backward.

    z_t = sum_i w_i x_{t-W+1+i},  y_t = z_t sigmoid(z_t),  u_t = y_t / (|y_t|_2 + 1e-6)

One launch handles queries, keys and values. A program owns one tile of channels: of queries and keys a head,
since their norm is per head.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import divides

EPS = tl.constexpr(1e-6)  # as in gka.layers.parts.modules.unit


@triton.jit
def add_state(z, state, b, at, cols, inside, C: tl.constexpr, W: tl.constexpr):
    """z, with cached inputs in place of its zeros for the tokens at [R] < 0."""
    if state is not None:
        where = b.to(tl.int64) * (C * W)
        offsets = cols[None, :] * W + (at[:, None] + W)
        cached = (at[:, None] < 0) & (at[:, None] >= -W) & inside[None, :]
        z += tl.load(state + where + offsets, mask=cached, other=0.0).to(tl.float32)
    return z


@triton.jit
def silu(z):
    """SiLU(z) and its derivative."""
    sigma = 1.0 / (1.0 + tl.exp(-z))
    return z * sigma, sigma * (1.0 + z * (1.0 - sigma))


@triton.jit
def unit_rows(y):
    """y / (|y| + 1e-6) of every row."""
    norm = tl.sqrt(tl.sum(y * y, 1))
    return y / (norm + EPS)[:, None]


@triton.jit
def through_unit(y, du):
    """The gradient of y from that of unit_rows(y)."""
    norm = tl.sqrt(tl.sum(y * y, 1))
    inverse = 1.0 / (norm + EPS)
    along = tl.sum(y * du, 1) * inverse * inverse
    along = tl.where(norm > 0.0, along / tl.where(norm > 0.0, norm, 1.0), 0.0)
    return du * inverse[:, None] - y * along[:, None]


@triton.jit
def shifted(window, x):
    """The window moved on by one token: the oldest entry dropped, x appended."""
    return window[1:] + (x,)


@triton.jit
def convolve_tile(
    x, w, state, y, past, lengths, b, block, tile, T, C: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, UNIT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of BT tokens and one tile of channels of q, k or v."""
    rows, cols = tl.arange(0, BT), tl.arange(0, BD)
    channels = tile * D + cols
    inside = (cols < D) & (channels < C)
    t0 = block * BT
    start = (b.to(tl.int64) * T + t0) * C
    at = t0 + rows
    exists = at < T
    seen = at
    if past is not None:
        seen = tl.load(past + at, mask=exists, other=0).to(tl.int32)
    z = tl.zeros((BT, BD), tl.float32)
    for i in tl.static_range(W):
        back = W - 1 - i
        weight = tl.load(w + channels * W + i, mask=inside, other=0.0).to(tl.float32)
        mask = exists & (seen >= back)
        place = at - back
        if past is not None:  # noqa: SIM102 - both are known at compile time
            if state is not None:  # before the first packed sequence, of whose tokens `past` knows
                mask = mask & (at >= back)
                place = tl.where(seen >= back, place, 0)
        mask = mask[:, None]
        if not divides(D, C) or not divides(BD, D):
            mask = mask & inside[None, :]
        tap = tl.load(
            x + start + ((rows - back)[:, None] * C + channels[None, :]), mask=mask, other=0.0
        )
        tap = tap.to(tl.float32)
        if state is not None:  # noqa: SIM102 - the first is known at compile time
            if t0 < W:
                tap = add_state(tap, state, b, place, channels, inside, C, W)
        z += weight[None, :] * tap
    out, _ = silu(z)
    if UNIT:
        out = unit_rows(out)
    if lengths is not None:
        out = tl.where((at < tl.load(lengths + b))[:, None], out, 0.0)
    mask = exists[:, None]
    if not divides(D, C) or not divides(BD, D):
        mask = mask & inside[None, :]
    tl.store(
        y + start + (rows[:, None] * C + channels[None, :]), out.to(y.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["T", "blocks"])
def convolution_kernel(
    xq, xk, xv, wq, wk, wv, sq, sk, sv, yq, yk, yv, past, lengths, T, blocks,
    CQ: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    W: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Unit queries and keys, and values (CV > 0), of BT tokens and a tile of channels.

    Args:
        xq, xk, xv: inputs [B,T,C]. wq, wk, wv: weights [C,1,W]. sq, sk, sv: the W inputs before [B,C,W],
            or None. yq, yk, yv: outputs.
        past: tokens before each in its packed sequence, at most W - 1 of them, [T]; None if not packed.
        lengths: tokens of each row [B]; later keys are zero. None: all tokens count.
        blocks: blocks of BT tokens in a sequence.
        CQ, CK, CV: channels. DK, DV: channels of a tile of queries and keys, and of values.
    """
    NQ: tl.constexpr = CQ // DK
    NK: tl.constexpr = CK // DK
    NV: tl.constexpr = (CV + DV - 1) // DV
    program = tl.program_id(0)
    tile, place = program % (NQ + NK + NV), program // (NQ + NK + NV)
    b, block = place // blocks, place % blocks
    if tile < NQ:
        convolve_tile(xq, wq, sq, yq, past, None, b, block, tile, T, CQ, DK, W, True, BT, BK)
    elif tile < NQ + NK:
        tile -= NQ
        convolve_tile(xk, wk, sk, yk, past, lengths, b, block, tile, T, CK, DK, W, True, BT, BK)
    else:
        if CV > 0:
            tile -= NQ + NK
            convolve_tile(xv, wv, sv, yv, past, None, b, block, tile, T, CV, DV, W, False, BT, BV)


@triton.jit
def load_token(
    ptr, start, t0, step, segments, L, T, cols, inside, C: tl.constexpr, D: tl.constexpr
):
    """Inputs of token `step` >= -W of each of a program's segments; zeros outside the sequence."""
    rel = segments * L + step
    at = t0 + rel
    mask = ((at >= 0) & (at < T))[:, None]
    if not divides(D, C) or not divides(cols.shape[0], D):
        mask = mask & inside[None, :]
    return tl.load(ptr + start + (rel[:, None] * C + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def through_tile(
    x, w, state, dy, dx, partial, past, lengths, b, block, tile, first, place, T, L,
    C: tl.constexpr, D: tl.constexpr, CALL: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx of R segments of L tokens of a tile of channels, and their part of dw.

    All segments advance together, token by token. Registers hold the window of inputs that z needs, and
    dx of the last W tokens, to which later tokens still add. Every byte is thus read and written once,
    except the W - 1 tokens around a segment. Loads run AHEAD tokens ahead; UNROLL steps go through the
    windows without moving them.
    """
    segments, cols = tl.arange(0, R), tl.arange(0, BD)
    channels = tile * D + cols
    inside = (cols < D) & (channels < C)
    t0 = block * (R * L)
    start = (b.to(tl.int64) * T + t0) * C
    zero = tl.zeros((R, BD), tl.float32)
    weights, window, pending, sums = (), (), (), ()
    for i in tl.static_range(W):
        weight = tl.load(w + channels * W + i, mask=inside, other=0.0).to(tl.float32)
        weights = weights + (weight[None, :],)
        pending = pending + (zero,)
        sums = sums + (zero,)
        before = load_token(x, start, t0, i - W, segments, L, T, channels, inside, C, D)
        before = before.to(tl.float32)
        if state is not None:
            at = t0 + segments * L + (i - W)
            before = add_state(before, state, b, at, channels, inside, C, W)
        window = window + (before,)
    coming_x, coming_dy = (), ()
    for early in tl.static_range(AHEAD):
        coming_x = coming_x + (
            load_token(x, start, t0, early, segments, L, T, channels, inside, C, D),
        )
        coming_dy = coming_dy + (
            load_token(dy, start, t0, early, segments, L, T, channels, inside, C, D),
        )
    for first_step in range(0, L + W - 1, UNROLL):
        for ahead in tl.static_range(UNROLL):
            step = segments * 0 + (first_step + ahead)
            now, do = coming_x[0].to(tl.float32), coming_dy[0].to(tl.float32)
            later = step + AHEAD
            coming_x = shifted(
                coming_x, load_token(x, start, t0, later, segments, L, T, channels, inside, C, D)
            )
            coming_dy = shifted(
                coming_dy, load_token(dy, start, t0, later, segments, L, T, channels, inside, C, D)
            )
            window, pending = shifted(window, now), shifted(pending, zero)
            at = t0 + segments * L + step
            if past is not None:
                seen = tl.load(past + at, mask=at < T, other=0).to(tl.int32)
            z = zero
            for i in tl.static_range(W):
                tap = window[i]
                if past is not None:
                    tap = tl.where((seen >= W - 1 - i)[:, None], tap, 0.0)
                z += weights[i] * tap
            y, slope = silu(z)
            if lengths is not None:
                do = tl.where((at < tl.load(lengths + b))[:, None], do, 0.0)
            if UNIT:
                do = through_unit(y, do)
            dz = do * slope
            own = tl.where(step < L, 1.0, 0.0)[:, None]
            added, summed = (), ()
            for i in tl.static_range(W):
                part = dz
                if past is not None:
                    part = tl.where((seen >= W - 1 - i)[:, None], dz, 0.0)
                # entry i of both windows belongs to the token W - 1 - i steps back
                added = added + (pending[i] + weights[i] * part,)
                if partial is not None:
                    summed = summed + (sums[i] + part * own * window[i],)
            pending = added
            if partial is not None:
                sums = summed
            if dx is not None:
                rel = segments * L + (step - (W - 1))
                mask = ((step >= W - 1) & (t0 + rel < T))[:, None]
                if not divides(D, C) or not divides(BD, D):
                    mask = mask & inside[None, :]
                offsets = rel[:, None] * C + channels[None, :]
                tl.store(dx + start + offsets, pending[0].to(dx.dtype.element_ty), mask=mask)
    if partial is not None:
        to = partial + (place.to(tl.int64) * CALL + first) * W
        for i in tl.static_range(W):
            tl.store(to + channels * W + i, tl.sum(sums[i], 0), mask=inside)


@triton.jit(do_not_specialize=["T", "L", "blocks"])
def convolution_backward_kernel(
    xq, xk, xv, wq, wk, wv, sq, sk, sv, dyq, dyk, dyv, dxq, dxk, dxv, partial, past, lengths,
    T, L, blocks,
    CQ: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    W: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SEGMENTS: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of convolution_kernel's inputs, and each place's part of its weights' gradients.

    Args:
        dyq, dyk, dyv: gradients of the outputs; dxq, dxk, dxv: of the inputs, or None.
        partial: [places, CQ + CK + CV, W] float32, to be summed over places; or None.
        L: tokens of a segment. blocks: places in a sequence, each of SEGMENTS L tokens.
        RK, RV: segments that a tile of queries and keys, or of values, processes at a time.
    """
    NQ: tl.constexpr = CQ // DK
    NK: tl.constexpr = CK // DK
    NV: tl.constexpr = (CV + DV - 1) // DV
    CALL: tl.constexpr = CQ + CK + CV
    program = tl.program_id(0)
    tile, place = program % (NQ + NK + NV), program // (NQ + NK + NV)
    b, block = place // blocks, place % blocks
    # A tile that processes fewer segments at a time has longer ones.
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
