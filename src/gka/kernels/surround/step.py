"""Convolutions, SiLU, unit norms and gates of a few tokens in decoding, in one launch.

The convolutions' states are updated in place; each channel of each row belongs to one program.
"""

import triton
import triton.language as tl

from gka.kernels.surround.convolution import EPS, shifted, silu
from gka.kernels.surround.gates import write_gates


@triton.jit
def step_tile(
    x, w, state, y, length, clear: tl.constexpr, b, tile, T, C: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, UNIT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of T tokens of a tile of channels, and the tile's state after the first `length` of them.

    Args:
        clear: whether y is zero from `length` on.
    """
    cols = tl.arange(0, BD)
    channels = tile * D + cols
    inside = (cols < D) & (channels < C)
    held = state + b * (C * W) + channels * W
    window, weights = (), ()
    for i in tl.static_range(W):
        window = window + (tl.load(held + i, mask=inside, other=0.0).to(tl.float32),)
        weights = weights + (tl.load(w + channels * W + i, mask=inside, other=0.0).to(tl.float32),)
    tl.debug_barrier()  # all threads have read the state that is overwritten below
    kept = window
    for t in range(T):
        at = (b * T + t) * C + channels
        window = shifted(window, tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
        z = tl.zeros((BD,), tl.float32)
        for i in tl.static_range(W):
            z += weights[i] * window[i]
        out, _ = silu(z)
        if UNIT:
            out = out / (tl.sqrt(tl.sum(out * out, 0)) + EPS)
        if length is None:
            kept = window
        else:
            after = ()
            for i in tl.static_range(W):
                after = after + (tl.where(t < length, window[i], kept[i]),)
            kept = after
            if clear:
                out = tl.where(t < length, out, 0.0)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    for i in tl.static_range(W):
        tl.store(held + i, kept[i].to(state.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def step_kernel(
    xq, xk, xv, wq, wk, wv, sq, sk, sv, yq, yk, yv,
    xb, xa2, xa, A_log, dt_bias, beta, alpha, g, lengths, T,
    CQ: tl.constexpr, CK: tl.constexpr, CV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, eps: tl.constexpr,
):  # fmt: skip
    """Convolutions and gates of T tokens; arguments as of convolution_kernel and gates_kernel.

    The states sq, sk, sv are updated in place.

    Args:
        lengths: tokens of each row [B]; later ones do not enter the state, and their key and g are zero.
        BT: at least T. H: heads of the gates, 0 without gates.
    """
    NQ: tl.constexpr = CQ // DK
    NK: tl.constexpr = CK // DK
    NV: tl.constexpr = (CV + DV - 1) // DV
    TILES: tl.constexpr = NQ + NK + NV + (1 if H > 0 else 0)
    program = tl.program_id(0)
    tile, b = program % TILES, (program // TILES).to(tl.int64)
    length = None
    if lengths is not None:
        length = tl.load(lengths + b)
    if tile < NQ:
        step_tile(xq, wq, sq, yq, length, False, b, tile, T, CQ, DK, W, True, BK)
    elif tile < NQ + NK:
        step_tile(xk, wk, sk, yk, length, True, b, tile - NQ, T, CK, DK, W, True, BK)
    elif tile < NQ + NK + NV:
        if CV > 0:
            step_tile(xv, wv, sv, yv, length, False, b, tile - NQ - NK, T, CV, DV, W, False, BV)
    else:
        if H > 0:
            heads, rows = tl.arange(0, BH), tl.arange(0, BT)
            exists = heads < H
            mask = (rows < T)[:, None] & exists[None, :]
            offsets = (b * T + rows)[:, None] * H + heads[None, :]
            inside = mask
            if lengths is not None:
                inside = mask & (rows < length)[:, None]
            write_gates(
                xb,
                xa2,
                xa,
                A_log,
                dt_bias,
                beta,
                alpha,
                g,
                offsets,
                mask,
                heads,
                exists,
                inside,
                eps,
            )
