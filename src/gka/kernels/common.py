"""Device functions that every kernel shares: tiles of a chunk, decays inside it, scaled operands."""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """Rows of one head of a [tokens, heads, dim] array as float32; zeros past the chunk and past dim."""
    offsets = (row[:, None] * heads + head) * dim + cols[None, :]
    mask = rows_valid[:, None] & (cols[None, :] < dim)
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, value, row, heads, head, dim: tl.constexpr, cols, rows_valid):
    """The inverse of load_rows, rounded to the array's dtype."""
    offsets = (row[:, None] * heads + head) * dim + cols[None, :]
    mask = rows_valid[:, None] & (cols[None, :] < dim)
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(ptr, row, heads, head, rows_valid, default: tl.constexpr):
    """A gate of one head, [C] float32; `default` where it is absent, 0 past the chunk's end."""
    if ptr is None:
        gate = tl.where(rows_valid, default, 0.0)
    else:
        gate = tl.load(ptr + row * heads + head, mask=rows_valid, other=0.0).to(tl.float32)
    return gate


@triton.jit
def decay_mask(b, places):
    """M_jt as rows t, columns j; exact zeros where j > t."""
    difference = b[:, None] - b[None, :]
    return tl.where(places[:, None] >= places[None, :], tl.exp(difference), 0.0)


@triton.jit
def operand(x, OP: tl.constexpr):
    """x / max|x| in the tensor cores' dtype, and max|x|: float16 never over- or underflows as a whole."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    return (x / largest).to(OP), largest


@triton.jit
def inverse(x):
    """1/x, and 0 where x is 0 or so small that 1/x would not be finite."""
    return tl.where(x > 1e-37, 1.0 / tl.where(x > 1e-37, x, 1.0), 0.0)


@triton.jit
def load_mix(q, x, alpha, row, H, h, K: tl.constexpr, rk, valid):
    """z = q + alpha (x - q); x where alpha is absent; q where there is no solve."""
    if x is None:
        z = load_rows(q, row, H, h, K, rk, valid)
    else:
        z = load_rows(x, row, H, h, K, rk, valid)
        if alpha is not None:
            raw = load_rows(q, row, H, h, K, rk, valid)
            z = raw + load_gate(alpha, row, H, h, valid, 1.0)[:, None] * (z - raw)
    return z
