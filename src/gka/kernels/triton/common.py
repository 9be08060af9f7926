"""Device functions that every kernel shares: tiles of a chunk, decays inside it, scaled operands."""

import torch
import triton
import triton.language as tl

from gka.maths.moments import reset_floor

RESET: tl.constexpr = tl.constexpr(reset_floor(torch.float32))


@triton.constexpr_function
def divides(block, size):
    """Whether `block` divides `size`, at compile time."""
    return size % block == 0


@triton.jit
def row_tile(row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """Start, offsets and mask of a chunk's rows in a [tokens, heads, dim] array.

    row is the chunk's first token (int64). Offsets from the start fit 32 bits. Where every column
    exists there is no column mask: each mask costs registers.
    """
    places = tl.arange(0, rows_valid.shape[0])
    start = (row * heads + head) * dim
    offsets = places[:, None] * (heads * dim) + cols[None, :]
    mask = rows_valid[:, None]
    if not divides(cols.shape[0], dim):
        mask = mask & (cols[None, :] < dim)
    return start, offsets, mask


@triton.jit
def load_raw(ptr, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """Rows of one head of a [tokens, heads, dim] array; zeros past the chunk and past dim."""
    start, offsets, mask = row_tile(row, heads, head, dim, cols, rows_valid)
    return tl.load(ptr + start + offsets, mask=mask, other=0.0)


@triton.jit
def load_rows(ptr, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """load_raw as float32."""
    return load_raw(ptr, row, heads, head, dim, cols, rows_valid).to(tl.float32)


@triton.jit
def row_maxima(raw):
    """max |x| of every row, float32. 16-bit magnitudes are compared as integers and so stay packed."""
    if raw.dtype.primitive_bitwidth == 16:
        largest = tl.max(raw.to(tl.int16, bitcast=True) & 0x7FFF, 1)
        return largest.to(tl.int16).to(raw.dtype, bitcast=True).to(tl.float32)
    else:  # noqa: RET505 - a compile-time branch
        return tl.max(tl.abs(raw), 1)


@triton.jit
def load_state(ptr, rk, rv, K: tl.constexpr, V: tl.constexpr):
    """Columns rv of a [K, V] state in its own dtype; zeros past K and V (masked only where needed)."""
    at = ptr + (rk[:, None] * V + rv[None, :])
    if divides(rk.shape[0], K) and divides(rv.shape[0], V):
        return tl.load(at)
    else:  # noqa: RET505 - a compile-time branch
        return tl.load(at, mask=(rk[:, None] < K) & (rv[None, :] < V), other=0.0)


@triton.jit
def halves(x):
    """Left and right columns of x."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def add_quarter(
    acc, x, ptr, first: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, TRANS: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """acc + x S for a quarter of S: the rows (TRANS: columns) from `first` on, which x's columns multiply."""
    if first < K:
        some = first + tl.arange(0, BK // 4)
        every = tl.arange(0, BK)
        if TRANS:
            inside = (every[:, None] < K) & (some[None, :] < K)
            tile = tl.load(ptr + (every[:, None] * K + some[None, :]), mask=inside, other=0.0)
            acc = tl.dot(x, tl.trans(tile), acc, input_precision=PREC)
        else:
            inside = (some[:, None] < K) & (every[None, :] < K)
            tile = tl.load(ptr + (some[:, None] * K + every[None, :]), mask=inside, other=0.0)
            acc = tl.dot(x, tile, acc, input_precision=PREC)
    return acc


@triton.jit
def add_product(
    acc, x, s, ptr, K: tl.constexpr, TILED: tl.constexpr, TRANS: tl.constexpr, PREC: tl.constexpr
):
    """acc + x S (TRANS: x S^T) for a state S [K, K], held in s or, if TILED, read from ptr in quarters."""
    if TILED:
        BK: tl.constexpr = x.shape[1]
        left, right = halves(x)
        x0, x1 = halves(left)
        x2, x3 = halves(right)
        acc = add_quarter(acc, x0, ptr, 0, K, BK, TRANS, PREC)
        acc = add_quarter(acc, x1, ptr, BK // 4, K, BK, TRANS, PREC)
        acc = add_quarter(acc, x2, ptr, BK // 2, K, BK, TRANS, PREC)
        acc = add_quarter(acc, x3, ptr, BK // 4 * 3, K, BK, TRANS, PREC)
    elif TRANS:
        acc = tl.dot(x, tl.trans(s), acc, input_precision=PREC)
    else:
        acc = tl.dot(x, s, acc, input_precision=PREC)
    return acc


@triton.jit
def store_state(ptr, value, rk, rv, K: tl.constexpr, V: tl.constexpr):
    """The inverse of load_state, rounded to the array's dtype."""
    at = ptr + (rk[:, None] * V + rv[None, :])
    value = value.to(ptr.dtype.element_ty)
    if divides(rk.shape[0], K) and divides(rv.shape[0], V):
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(rk[:, None] < K) & (rv[None, :] < V))


@triton.jit
def store_rows(ptr, value, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """The inverse of load_rows, rounded to the array's dtype."""
    start, offsets, mask = row_tile(row, heads, head, dim, cols, rows_valid)
    tl.store(ptr + start + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(ptr, row, heads, head, rows_valid, default: tl.constexpr):
    """A gate of one head, [C] float32; `default` if it is None, 0 past the chunk's end."""
    if ptr is None:
        gate = tl.where(rows_valid, default, 0.0)
    else:
        at = ptr + (row * heads + head) + tl.arange(0, rows_valid.shape[0]) * heads
        gate = tl.load(at, mask=rows_valid, other=0.0).to(tl.float32)
    return gate


@triton.jit
def load_decay(ptr, row, heads, head, rows_valid):
    """Log decays of one head, [C] float32, at least gka.maths.moments.reset_floor; NaN stays NaN."""
    gate = load_gate(ptr, row, heads, head, rows_valid, 0.0)
    return tl.where(gate < RESET, RESET, gate)


@triton.jit
def cumulative_decays(gate):
    """Cumulative log decay as two sums: of the gates rounded to even integers, and of the remainders.

    Both are almost exact; a single float32 sum would round what follows a large term. Gates between
    -1 and 0 are remainders alone.
    """
    coarse = tl.floor(gate * 0.5 + 0.5) * 2.0
    return tl.cumsum(coarse, 0), tl.cumsum(gate - coarse, 0)


@triton.jit
def decays_to_end(gate):
    """Log decay over the chunk, and decay from each token to the chunk's end [C]."""
    coarse, fine = cumulative_decays(gate)
    total = tl.floor(gate * 0.5 + 0.5) * 2.0
    fine_total = tl.sum(gate - total, 0)
    coarse_total = tl.sum(total, 0)
    return coarse_total + fine_total, tl.exp((coarse_total - coarse) + (fine_total - fine))


@triton.jit
def store_gate(ptr, value, row, heads, head, rows_valid):
    """Store a number per token of one head."""
    at = ptr + (row * heads + head) + tl.arange(0, rows_valid.shape[0]) * heads
    tl.store(at, value, mask=rows_valid)


@triton.jit
def decay_mask(coarse, fine, places):
    """M_jt (row t, column j) from the sums of cumulative_decays; exact zeros where j > t."""
    difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.where(places[:, None] >= places[None, :], tl.exp(difference), 0.0)


@triton.jit
def operand(x, OP: tl.constexpr):
    """x / max|x| in the tensor cores' dtype, and max|x|: scaled so, a tile fits float16 whatever its size."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    return (x / largest).to(OP), largest


@triton.jit
def shares(rows, largest):
    """s_j / largest and its inverse, a power of two with max|k_j| / s_j in (1/2, 1]; s_j = 0 for k_j = 0."""
    ratio = largest / tl.where(rows > 0.0, rows, largest)
    ratio = tl.where(ratio < 1e30, ratio, 1e30)  # finite for a subnormal row too
    power = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(rows > 0.0, 1.0 / power, 0.0), power


@triton.jit
def key_operand(k, OP: tl.constexpr):
    """k_j / s_j in the tensor cores' dtype, s_j / max|k| [C], max|k|.

    Each key has a scale of its own, so that W_tj s_j^2 <= 4 F_t however large the keys that have faded.
    """
    rows = tl.max(tl.abs(k), 1)
    largest = tl.max(rows, 0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    share, power = shares(rows, largest)
    return ((k / largest) * power[:, None]).to(OP), share, largest


@triton.jit
def inverse(x):
    """1/x; 0 if x is 0 or so small that 1/x is not finite."""
    return tl.where(x > 1e-37, 1.0 / tl.where(x > 1e-37, x, 1.0), 0.0)


@triton.jit
def load_mix(q, x, x_scale, alpha, row, H, h, K: tl.constexpr, rk, valid):
    """z = q + alpha (x - q) as float32; x if alpha is None; q without a solve."""
    if x is None:
        z = load_rows(q, row, H, h, K, rk, valid)
    else:
        z = load_scaled(x, x_scale, row, H, h, K, rk, valid)
        if alpha is not None:
            raw = load_rows(q, row, H, h, K, rk, valid)
            share = load_gate(alpha, row, H, h, valid, 1.0)[:, None]
            z = (1.0 - share) * raw + share * z  # no difference of z and raw: it would cancel
    return z


@triton.jit
def load_scaled(ptr, scale, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """Rows that store_scaled wrote, float32."""
    rows = load_rows(ptr, row, heads, head, dim, cols, rows_valid)
    return rows * load_gate(scale, row, heads, head, rows_valid, 0.0)[:, None]


@triton.jit
def store_scaled(ptr, scale, value, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """Store every row divided by its largest entry, and that entry in `scale`: 16 bits then hold any size."""
    largest = tl.max(tl.abs(value), 1)
    store_rows(ptr, value * inverse(largest)[:, None], row, heads, head, dim, cols, rows_valid)
    store_gate(scale, largest, row, heads, head, rows_valid)


@triton.jit
def sum_blocks(ptr, index, N: tl.constexpr):
    """Sum of N consecutive numbers."""
    total = 0.0
    for i in tl.static_range(N):
        total += tl.load(ptr + index * N + i)
    return total
