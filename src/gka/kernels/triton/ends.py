"""What a text adds to H and U, read from empty states, and the gradient of it: products without a scan.

With D_c the log decay from chunk c's end to its sequence's end, d_j = exp(D_c) times the decay from token j
to the chunk's end, and w_j = beta_j^2 d_j,

    E = sum_j w_j k_j v_j^T.

For gradients G of U's and, made symmetric, of H's E, with a_j = G v_j,

    dk_j = w_j a_j,  dv_j = w_j G^T k_j,  e_j = d_j k_j . a_j,  dbeta_j = 2 beta_j e_j,
    dg_i = the sum of beta_j^2 e_j over the tokens j < i.

Chunks whose decay to the end is 0 in float32 add nothing: those before the first other one are not read.
"""

import triton
import triton.language as tl

from gka.kernels.triton.common import (
    decays_to_end,
    inverse,
    load_decay,
    load_gate,
    load_raw,
    load_rows,
    load_state,
    row_maxima,
    store_gate,
    store_rows,
    store_state,
)
from gka.kernels.triton.scan import scaled_rows, unit_of

FORGOTTEN: tl.constexpr = tl.constexpr(-104.0)  # its exp is 0 in float32


@triton.jit
def decay_after(after, c, h, H):
    """Log decay from chunk c's end to its sequence's."""
    log = 0.0
    if after is not None:
        log = tl.load(after + c * H + h)
    return log


@triton.jit
def decays(g, log_after, row, valid, h, H):
    """d_j [C], the decays to the sequence's end."""
    _, to_end = decays_to_end(load_decay(g, row, H, h, valid))
    return tl.exp(log_after) * to_end


@triton.jit
def sum_chunks(
    k, v, g, beta, after, sums, start, length, segment, first, end, h, block,
    H: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, OP: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Columns of one head's E, summed over the chunks of a segment."""
    rk, rv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    begin = end
    for c in range(first, end):
        begin = tl.minimum(begin, tl.where(decay_after(after, c, h, H) > FORGOTTEN, c, end))
    for c in range(begin, end):
        row, valid = tl.load(start + c), tl.arange(0, C) < tl.load(length + c)
        kt = load_raw(k, row, HK, h // GK, K, rk, valid)
        vt = load_raw(v, row, HV, h // GV, V, rv, valid)
        write = load_gate(beta, row, H, h, valid, 1.0)
        weight = decays(g, decay_after(after, c, h, H), row, valid, h, H) * write * write
        k_max = row_maxima(kt)
        unit = unit_of(tl.sum(weight * k_max * row_maxima(vt), 0), 0.0, 0.0)
        kn, vn = scaled_rows(kt, vt, weight, k_max, unit)
        state += tl.dot(tl.trans(kn.to(OP)), vn.to(OP), input_precision=PREC) * unit
    store_state(sums + (segment.to(tl.int64) * H + h) * K * V, state, rk, rv, K, V)


@triton.jit
def ends_kernel(
    k,  # [tokens, HK, K]
    v,  # [tokens, HV, V]
    gk,  # [tokens, H] or None: decay of H
    g,  # [tokens, H] or None: decay of U
    beta,  # [tokens, H] or None
    after_h,  # [M, H] float32 or None: log decay from a chunk's end to the sequence's, of H
    after_u,  # [M, H] or None: of U
    sums_h,  # [S, H, K, K] float32, or None without H
    sums_u,  # [S, H, K, V]
    start,  # [M] int64: a chunk's first token
    length,  # [M] int32: its tokens
    segments,  # [S, 5] int32: gka.kernels.tables.Chunking
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    GK: tl.constexpr,  # heads that share a key head
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,  # columns of E that a program owns
    NK: tl.constexpr,  # blocks of H's columns, 0 without H
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """What each segment of chunks adds to H and U at its sequence's end; the first NK blocks are H's."""
    segment, h, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = tl.load(segments + segment * 5 + 1), tl.load(segments + segment * 5 + 2)
    if NK > 0:  # noqa: SIM102 - two conditions, since without H its array is None
        if block < NK:
            sum_chunks(
                k, k, gk, beta, after_h, sums_h, start, length, segment, first, end, h, block, H,
                HK, HK, GK, GK, K, K, BK, BN, C, OP, PREC,
            )  # fmt: skip
    if block >= NK:
        sum_chunks(
            k, v, g, beta, after_u, sums_u, start, length, segment, first, end, h, block - NK, H,
            HK, HV, GK, GV, K, V, BK, BN, C, OP, PREC,
        )  # fmt: skip


@triton.jit
def rows_operand(x, OP: tl.constexpr):
    """Rows over their largest entry in the tensor cores' dtype, and that entry [C]."""
    largest = row_maxima(x)
    return (x.to(tl.float32) * inverse(largest)[:, None]).to(OP), largest


@triton.jit
def prefix(terms, out, totals, row, valid, c, h, H):
    """Store the sums of the chunk's earlier terms [C] per token, and of all of them per chunk."""
    store_gate(out, tl.cumsum(terms, 0) - terms, row, H, h, valid)
    tl.store(totals + c * H + h, tl.sum(terms, 0))


@triton.jit
def ends_backward_kernel(
    k,  # [tokens, HK, K]
    v,  # [tokens, HV, V]
    gk,  # [tokens, H] or None
    g,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    after_h,  # [M, H] float32 or None
    after_u,  # [M, H] or None
    grad_h,  # [N, H, K, K] of the operands' dtype, symmetric, over its scale; or None
    scale_h,  # [N, H]
    grad_u,  # [N, H, K, V]
    scale_u,  # [N, H]
    dk,  # [tokens, H, K]
    dv,  # [tokens, H, V]
    dgk,  # [tokens, H] float32: sums of the chunk's earlier terms; None if tied or without gk
    dg,  # [tokens, H] or None
    totals_h,  # [M, H] float32: sums of the chunk's terms, or None
    totals_u,  # [M, H] or None
    dbeta,  # [tokens, H] or None
    start,  # [M] int64
    length,  # [M] int32
    owner,  # [M] int64: the sequence of each chunk
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,  # columns of a product at a time
    TIED: tl.constexpr,  # g decays both states: dg is the sum of both gradients
    C: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradients of one chunk's keys, values, decays and write gates, for one head."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, n = tl.load(start + c), tl.load(owner + c)
    valid = tl.arange(0, C) < tl.load(length + c)
    rk, rv, rn = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    after_of_u = decay_after(after_u, c, h, H)
    after_of_h = after_of_u
    if grad_h is not None:
        after_of_h = decay_after(after_h, c, h, H)
    of_u = tl.zeros((C,), tl.float32)  # k . (G v) of U
    of_h = tl.zeros((C,), tl.float32)
    d_u = tl.zeros((C,), tl.float32)
    d_h = tl.zeros((C,), tl.float32)
    write = load_gate(beta, row, H, h, valid, 1.0)
    square = write * write
    if tl.maximum(after_of_u, after_of_h) > FORGOTTEN:
        key, k_max = rows_operand(load_raw(k, row, HK, h // GK, K, rk, valid), OP)
        value, v_max = rows_operand(load_raw(v, row, HV, h // GV, V, rv, valid), OP)
        state_u = grad_u + (n * H + h) * K * V
        v_max *= tl.load(scale_u + n * H + h)
        d_u = decays(g, after_of_u, row, valid, h, H)
        if grad_h is not None:
            state_h = grad_h + (n * H + h) * K * K
            h_max = k_max * tl.load(scale_h + n * H + h)
            d_h = decays(gk, after_of_h, row, valid, h, H)
        for block in tl.static_range((K + BN - 1) // BN):
            cols = block * BN + rn
            some = load_rows(k, row, HK, h // GK, K, cols, valid)
            tile = load_state(state_u, cols, rv, K, V)
            along = tl.dot(value, tl.trans(tile), input_precision=PREC) * v_max[:, None]
            of_u += tl.sum(along * some, 1)
            grad = along * (d_u * square)[:, None]
            if grad_h is not None:
                tile = load_state(state_h, rk, cols, K, K)
                along = tl.dot(key, tile, input_precision=PREC) * h_max[:, None]
                of_h += tl.sum(along * some, 1)
                grad += along * (d_h * square)[:, None]
            store_rows(dk, grad, row, H, h, K, cols, valid)
        for block in tl.static_range((V + BN - 1) // BN):
            cols = block * BN + rn
            tile = load_state(state_u, rk, cols, K, V)
            grad = tl.dot(key, tile, input_precision=PREC)
            grad *= (d_u * square * k_max * tl.load(scale_u + n * H + h))[:, None]
            store_rows(dv, grad, row, H, h, V, cols, valid)
    else:
        store_rows(dk, tl.zeros((C, BK), tl.float32), row, H, h, K, rk, valid)
        store_rows(dv, tl.zeros((C, BV), tl.float32), row, H, h, V, rv, valid)
    of_u *= d_u
    of_h *= d_h * 0.5  # G_H counts each entry and its mirror
    if dbeta is not None:
        store_gate(dbeta, 2.0 * write * (of_u + of_h), row, H, h, valid)
    if dgk is not None:
        prefix(square * of_h, dgk, totals_h, row, valid, c, h, H)
    if dg is not None:
        if TIED:
            of_u += of_h
        prefix(square * of_u, dg, totals_u, row, valid, c, h, H)
