"""Short causal depthwise convolution, SiLU and the unit norm of a head.

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
def segments_of(
    b, block, tile, T, L, C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr
):
    """R segments of L tokens of a tile of channels.

    Returns:
        Channels and whether they exist [BD]; first tokens, and tokens from there to the sequence's end [R];
        the first one's start in [B,T,C], and offsets from it [R,BD].
    """
    segments, cols = tl.arange(0, R), tl.arange(0, BD)
    channels = tile * D + cols
    inside = (cols < D) & (channels < C)
    start = (b.to(tl.int64) * T + block * (R * L)) * C
    at = block * (R * L) + segments * L
    left = T - at
    offsets = (segments * L)[:, None] * C + channels[None, :]
    return channels, inside, at, left, start, offsets


@triton.jit
def convolve_tile(
    x, w, state, y, past, lengths, b, block, tile, T, L, C: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """y of R segments of L tokens of a tile of channels of q, k or v.

    Loads run AHEAD tokens ahead; UNROLL steps go through the window without moving it.
    """
    WHOLE: tl.constexpr = divides(D, C) and divides(BD, D)
    PACKED: tl.constexpr = past is not None
    channels, inside, at, left, start, offsets = segments_of(b, block, tile, T, L, C, D, R, BD)
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
