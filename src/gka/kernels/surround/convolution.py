"""Short causal depthwise convolution, SiLU and the unit norm of a head, forward and backward.

    z_t = sum_i w_i x_{t-W+1+i},  y_t = z_t sigmoid(z_t),  u_t = y_t / (|y_t|_2 + 1e-6)

One launch handles queries, keys and values. A program owns a tile of channels, of queries and keys a head,
since their norm is per head. It takes several segments of the sequence through it together, token by token:
registers hold what the next tokens need, and every number is loaded and converted once, except the W - 1
tokens around a segment.
"""

import os

import triton
import triton.language as tl

from gka.kernels.triton.common import divides

EPS = tl.constexpr(1e-6)  # as in gka.layers.parts.modules.unit
COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), compiled without the range checks of exp and division, which cost as much again."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.ftz.f32 e, $1, 0fBFB8AA3B; // -log2(e)
            ex2.approx.ftz.f32 e, e;
            add.ftz.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
            }""",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505 - a compile-time branch
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def reciprocal(x):
    """1 / x of x in [1e-30, 1e30], compiled without range checks."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505 - a compile-time branch
        return 1.0 / x


@triton.jit
def silu(z):
    """SiLU(z) and its derivative."""
    share = sigmoid(z)
    y = z * share
    return y, share + y * (1.0 - share)


@triton.jit
def unit_rows(y):
    """y / (|y| + 1e-6) of every row."""
    norm = tl.sqrt(tl.sum(y * y, 1))
    return y * reciprocal(norm + EPS)[:, None]


@triton.jit
def through_unit(y, du):
    """The gradient of y from that of unit_rows(y)."""
    norm = tl.sqrt(tl.sum(y * y, 1))
    inverse = reciprocal(norm + EPS)
    # below 1e-18 the second term vanishes beside the first
    along = tl.sum(y * du, 1) * (inverse * inverse) * reciprocal(tl.maximum(norm, 1e-18))
    return du * inverse[:, None] - y * along[:, None]


@triton.jit
def shifted(window, x):
    """The window moved on by one token: the oldest entry dropped, x appended."""
    return window[1:] + (x,)


@triton.jit
def load_token(ptrs, step, exists, inside, C: tl.constexpr, WHOLE: tl.constexpr):
    """Token `step` of every segment, [R,BD]; zeros where it does not exist.

    Args:
        ptrs: to the segments' first tokens. exists: [R]. WHOLE: whether all channels are inside.
    """
    mask = exists[:, None]
    if not WHOLE:
        mask = mask & inside[None, :]
    return tl.load(ptrs + step * C, mask=mask, other=0.0)


@triton.jit
def store_token(ptrs, value, step, exists, inside, C: tl.constexpr, WHOLE: tl.constexpr):
    """The inverse of load_token."""
    mask = exists[:, None]
    if not WHOLE:
        mask = mask & inside[None, :]
    tl.store(ptrs + step * C, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def load_ahead(ptrs, left, inside, AHEAD: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """The first AHEAD tokens of every segment; left: tokens from its first to the sequence's end [R]."""
    tokens = ()
    for step in tl.static_range(AHEAD):
        tokens = tokens + (load_token(ptrs, step, left > step, inside, C, WHOLE),)
    return tokens


@triton.jit
def load_weights(w, channels, inside, W: tl.constexpr):
    """The W weights of every channel, [1,BD] float32 each."""
    weights = ()
    for i in tl.static_range(W):
        weight = tl.load(w + channels * W + i, mask=inside, other=0.0).to(tl.float32)
        weights = weights + (weight[None, :],)
    return weights


@triton.jit
def load_window(
    ptrs, state, b, at, left, channels, inside, C: tl.constexpr, W: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before every segment, [R,BD] float32 each; those before the sequence from the state.

    Args:
        at: the segments' first tokens [R]. left: tokens from there to the sequence's end.
    """
    window = ()
    for i in tl.static_range(W - 1):
        back = W - 1 - i
        exists = (at >= back) & (left > -back)
        before = load_token(ptrs, -back, exists, inside, C, WHOLE).to(tl.float32)
        if state is not None:
            place = at - back
            offsets = channels[None, :] * W + (place[:, None] + W)
            cached = (place < 0)[:, None] & inside[None, :]
            held = tl.load(state + b.to(tl.int64) * (C * W) + offsets, mask=cached, other=0.0)
            before += held.to(tl.float32)
        window = window + (before,)
    return window


@triton.jit
def seen_ahead(past, at, left, AHEAD: tl.constexpr):
    """Tokens before each of the first AHEAD ones in their packed sequences, [R] each; () if not packed."""
    seen = ()
    if past is not None:
        for step in tl.static_range(AHEAD):
            seen = seen + (tl.load(past + (at + step), mask=left > step, other=0),)
    return seen


@triton.jit
def seen_later(seen, past, at, exists):
    """The next entries of seen_ahead, with that of the tokens at [R]."""
    if past is not None:
        seen = shifted(seen, tl.load(past + at, mask=exists, other=0))
    return seen


@triton.jit
def seen_now(seen, past, at):
    """The first entry of seen_ahead; of no use, like `at`, if not packed."""
    first = at
    if past is not None:
        first = seen[0].to(tl.int32)
    return first


@triton.jit
def where_seen(x, seen, back: tl.constexpr, PACKED: tl.constexpr):
    """x where the token `back` places back belongs to the same packed sequence, else 0."""
    if PACKED:
        x = tl.where((seen >= back)[:, None], x, 0.0)
    return x


@triton.jit
def filtered(window, weights, seen, W: tl.constexpr, PACKED: tl.constexpr):
    """z of the newest of W tokens."""
    z = weights[W - 1] * window[W - 1]
    for i in tl.static_range(W - 1):
        z += weights[i] * where_seen(window[i], seen, W - 1 - i, PACKED)
    return z


@triton.jit
def convolve_tile(
    x, w, state, y, past, lengths, b, block, tile, T, L, C: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """y of R segments of L tokens of a tile of channels of q, k or v.

    Loads run AHEAD tokens ahead; UNROLL steps go through the window without moving it.
    """
    segments, cols = tl.arange(0, R), tl.arange(0, BD)
    channels = tile * D + cols
    inside = (cols < D) & (channels < C)
    WHOLE: tl.constexpr = divides(D, C) and divides(BD, D)
    PACKED: tl.constexpr = past is not None
    start = (b.to(tl.int64) * T + block * (R * L)) * C
    at = block * (R * L) + segments * L
    left = T - at
    offsets = (segments * L)[:, None] * C + channels[None, :]
    from_x, to_y = x + start + offsets, y + start + offsets
    weights = load_weights(w, channels, inside, W)
    window = load_window(from_x, state, b, at, left, channels, inside, C, W, WHOLE)
    coming = load_ahead(from_x, left, inside, AHEAD, C, WHOLE)
    coming_seen = seen_ahead(past, at, left, AHEAD)
    needed, counted = tl.minimum(left, L), left
    if lengths is not None:
        counted = tl.load(lengths + b).to(tl.int32) - at
    for first_step in range(0, L, UNROLL):
        for ahead in tl.static_range(UNROLL):
            step = first_step + ahead
            full = window + (coming[0].to(tl.float32),)
            later = step + AHEAD
            coming = shifted(coming, load_token(from_x, later, needed > later, inside, C, WHOLE))
            seen = seen_now(coming_seen, past, at)
            coming_seen = seen_later(coming_seen, past, at + later, needed > later)
            z = filtered(full, weights, seen, W, PACKED)
            window = full[1:]
            out, _ = silu(z)
            if UNIT:
                out = unit_rows(out)
            if lengths is not None:
                out = tl.where((counted > step)[:, None], out, 0.0)
            store_token(to_y, out, step, left > step, inside, C, WHOLE)


@triton.jit(do_not_specialize=["T", "L", "blocks"])
def convolution_kernel(
    xq, xk, xv, wq, wk, wv, sq, sk, sv, yq, yk, yv, past, lengths, T, L, blocks,
    CQ: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    SEGMENTS: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Unit queries and keys, and values (CV > 0), of a tile of channels of a place in the sequence.

    Args:
        xq, xk, xv: inputs [B,T,C]. wq, wk, wv: weights [C,1,W]. sq, sk, sv: the W inputs before [B,C,W],
            or None. yq, yk, yv: outputs.
        past: tokens before each in its packed sequence, at most W - 1 of them, [T]; None if not packed.
        lengths: tokens of each row [B]; later keys are zero. None: all tokens count.
        L: tokens of a segment, a multiple of UNROLL. blocks: places in a sequence, of SEGMENTS L tokens.
        CQ, CK, CV: channels. DK, DV: channels of a tile of queries and keys, and of values.
        RK, RV: segments that a tile of queries and keys, or of values, processes at a time.
    """
    NQ: tl.constexpr = CQ // DK
    NK: tl.constexpr = CK // DK
    NV: tl.constexpr = (CV + DV - 1) // DV
    program = tl.program_id(0)
    tile, place = program % (NQ + NK + NV), program // (NQ + NK + NV)
    b, block = place // blocks, place % blocks
    # A tile that processes fewer segments at a time has longer ones.
    if tile < NQ:
        convolve_tile(
            xq, wq, sq, yq, past, None, b, block, tile, T, L * (SEGMENTS // RK),
            CQ, DK, W, True, RK, BK, AHEAD, UNROLL,
        )  # fmt: skip
    elif tile < NQ + NK:
        convolve_tile(
            xk, wk, sk, yk, past, lengths, b, block, tile - NQ, T, L * (SEGMENTS // RK),
            CK, DK, W, True, RK, BK, AHEAD, UNROLL,
        )  # fmt: skip
    else:
        if CV > 0:
            convolve_tile(
                xv, wv, sv, yv, past, None, b, block, tile - NQ - NK, T, L * (SEGMENTS // RV),
                CV, DV, W, False, RV, BV, AHEAD, UNROLL,
            )  # fmt: skip


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
    segments, cols = tl.arange(0, R), tl.arange(0, BD)
    channels = tile * D + cols
    inside = (cols < D) & (channels < C)
    WHOLE: tl.constexpr = divides(D, C) and divides(BD, D)
    PACKED: tl.constexpr = past is not None
    start = (b.to(tl.int64) * T + block * (R * L)) * C
    at = block * (R * L) + segments * L
    left = T - at
    offsets = (segments * L)[:, None] * C + channels[None, :]
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
                complete = (left > done) & (segments * 0 + done >= 0)
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
