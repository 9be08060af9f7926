"""The kernels of maths/recurrent.py: token by token, states in place, one program per sequence and head.

H stays in registers from the first token to the last. U is read in blocks of columns, once per token.
"""

import triton
import triton.language as tl
from torch import Tensor

from gka.kernels.triton.certify import THETA_FLOOR, WORTHWHILE, WORTHWHILE_OF
from gka.kernels.triton.cg import solve_state

EPS: tl.constexpr = tl.constexpr(2.0**-23)  # of float32
# Warps that hold H in registers, by its padded width: the fewest that do not spill it. 256 columns always
# spill; 16 warps with all the registers they can have spill least.
HELD: dict[int, dict[str, int]] = {
    16: {"num_warps": 1},
    32: {"num_warps": 1},
    64: {"num_warps": 2},
    128: {"num_warps": 4},
    256: {"num_warps": 16, "maxnreg": 128},
}
COLUMNS = 16  # columns of U in a block
ROWS = 16  # rows of H and U that a program of advance_kernel owns


def width(dim: int) -> int:
    """A head dimension as these kernels pad it."""
    return max(16, triton.next_power_of_2(dim))


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, token and head."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


@triton.jit
def token_entry(ptr, batch, token, head, batch_stride, token_stride, head_stride):
    """Address of a token's entries of a head in a strided [B, T, heads, ...] array."""
    return ptr + batch * batch_stride + token * token_stride + head * head_stride


@triton.jit
def load_number(ptr, batch, token, head, strides, otherwise):
    """A gate [B, T, H] of one token and head, float32; `otherwise` if it is None."""
    value = otherwise
    if ptr is not None:
        at = token_entry(ptr, batch, token, head, strides[0], strides[1], strides[2])
        value = tl.load(at).to(tl.float32)
    return value


@triton.jit
def load_vector(ptr, batch, token, head, strides, cols, dim: tl.constexpr):
    """A token's vector of a head [B, T, heads, dim], float32; zeros past dim."""
    at = token_entry(ptr, batch, token, head, strides[0], strides[1], strides[2])
    return tl.load(at + cols, mask=cols < dim, other=0.0).to(tl.float32)


@triton.jit
def place_of(indices, bounds, sequence, length, pool):
    """(batch row, first token, number of tokens, place in the pool, whether it has a place) of a sequence."""
    batch, begin, count = sequence, sequence * 0, length
    if bounds is not None:
        batch = sequence * 0
        begin = tl.load(bounds + sequence).to(tl.int64)
        count = (tl.load(bounds + sequence + 1) - begin).to(tl.int32)
    place = sequence
    if indices is not None:
        place = tl.load(indices + sequence).to(tl.int64)
    return batch, begin, count, place, (place >= 0) & (place < pool)


@triton.jit
def arcosh_1p(x):
    """acosh(1 + x), accurate for small x too: log(1 + y), corrected for the rounding of 1 + y (Kahan)."""
    y = x + tl.sqrt(x * (x + 2.0))
    near = 1.0 + y
    return tl.where(near == 1.0, y, tl.log(near) * (y / tl.where(near == 1.0, 1.0, near - 1.0)))


@triton.jit
def tighten(h, fro, ridge_ratio, num_iter, K: tl.constexpr, BK: tl.constexpr):
    """(w, strength, phi, steps) of maths/solvers/adaptive.py for a state h with |h| = fro."""
    slack_sum: tl.constexpr = 4.0 * K * EPS
    slack_operator: tl.constexpr = EPS
    rows = tl.arange(0, BK)
    inverse = 1.0 / fro
    diagonal = tl.sum(tl.where(rows[:, None] == rows[None, :], h, 0.0), 1)
    first = tl.argmax(diagonal, 0)
    v = tl.sum(tl.where(rows[None, :] == first, h, 0.0), 1) * inverse
    v = tl.sum(h * v[None, :], 1) * inverse
    v *= 1.0 / tl.sqrt(tl.sum(v * v, 0))
    u = tl.sum(h * v[None, :], 1) * inverse
    theta = tl.maximum(tl.sum(u * v, 0), 0.0) * (1.0 + slack_sum + slack_operator) + THETA_FLOOR
    square = tl.sum(u * u, 0)
    strength = square / theta
    w = u * (1.0 / tl.sqrt(square))
    rayleigh = tl.sum(w * tl.sum(h * w[None, :], 1), 0) * inverse
    mean = (tl.sum(diagonal, 0) * inverse - strength) / K
    left = 1.0 - 2.0 * strength * rayleigh + strength * strength
    spread = (1.0 - 1.0 / K) * tl.maximum(left - K * mean * mean, 0.0) + slack_sum
    phi = tl.minimum(mean + tl.sqrt(spread) + slack_sum + slack_operator, 1.0)
    ratio = arcosh_1p(2.0 * ridge_ratio) / arcosh_1p(2.0 * ridge_ratio / phi)
    steps = tl.maximum(tl.ceil((num_iter + 1) * ratio) - 1.0, 0.0).to(tl.int32)
    return w, strength, phi, steps


@triton.jit
def solve(
    h, q, fro, ridge_ratio, num_iter, K: tl.constexpr, BK: tl.constexpr, ADAPTIVE: tl.constexpr
):
    """x of (h + a F) x = q with |h| = fro > 0: the residual form (maths/solvers/chebyshev.py)."""
    lamb = ridge_ratio * fro
    phi, steps = 1.0, num_iter
    w = tl.zeros([BK], tl.float32)
    tau = 0.0
    if ADAPTIVE:
        w, strength, phi, steps = tighten(h, fro, ridge_ratio, num_iter, K, BK)
        # False for NaN too: a vector of length zero or beyond float32's range means plain steps.
        worthwhile = (WORTHWHILE_OF * steps <= WORTHWHILE * num_iter) & (strength >= 0.0)
        tau = tl.where(worthwhile, strength / (ridge_ratio + strength), 0.0)
        phi = tl.where(worthwhile, phi, 1.0)
        steps = tl.where(worthwhile, steps, num_iter)
        w = tl.where(worthwhile, w, 0.0)
    rho = 1.0 / (1.0 + 2.0 * ridge_ratio / phi)
    step = 2.0 / ((phi + 2.0 * ridge_ratio) * fro)
    r = q
    d = step * r
    if ADAPTIVE:
        d -= (step * tau * tl.sum(w * r, 0)) * w
    x = d
    omega = 2.0
    for _ in range(steps):
        r = r - (tl.sum(h * d[None, :], 1) + lamb * d)
        omega = 4.0 / (4.0 - rho * rho * omega)
        gain = omega * step
        d = (omega - 1.0) * d + gain * r
        if ADAPTIVE:
            d -= (gain * tau * tl.sum(w * r, 0)) * w
        x = x + d
    return x


# not specialised: another batch or length needs no new compilation
@triton.jit(do_not_specialize=["num_iter", "length", "pool"])
def step_kernel(
    q,  # [B, T, H, K], strided
    k,  # [B, T, HK, K], strided
    v,  # [B, T, HV, V], strided
    g,  # [B, T, H] float32 or None, strided: log decay of U
    gk,  # [B, T, H] or None: log decay of H
    alpha,  # [B, T, H] or None
    beta,  # [B, T, H] or None
    h_pool,  # [P, H, K, K] float32 or None
    u_pool,  # [P, H, K, V] float32 or bfloat16
    work,  # [B, H, K, V] float32: U between tokens where u_pool must not or cannot hold it; else None
    indices,  # [B] or None: each sequence's place in the pool
    bounds,  # [B + 1] or None: of packed sequences
    o,  # [B, T, H, V]
    x,  # [B, T, H, K] float32 or None
    strides,  # (batch, token, head) of q, k, v, g, gk, alpha, beta
    h_stride,  # from state to state of the pool
    u_stride,
    scale,
    ridge_ratio,
    num_iter,
    empty_below,
    stop,  # of conjugate gradients, of which num_iter is the largest number of steps; else None
    length,
    pool,
    H,
    HK,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,  # columns of U in a block
    COMMIT: tl.constexpr,
    SOLVE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    """Decay, update, ridge, solve, mix and readout of every token of one sequence and head."""
    sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    batch, begin, count, place, alive = place_of(indices, bounds, sequence, length, pool)
    first_row = (begin + sequence * length if bounds is None else begin) * H + head
    rows, cols, few = tl.arange(0, BK), tl.arange(0, BK), tl.arange(0, BV)
    inside = (rows[:, None] < K) & (cols[None, :] < K)
    # `alive` enters by tl.where: the interpreter turns `&` with a scalar truth value into integers
    inside = (rows[:, None] < tl.where(alive, K, 0)) & (cols[None, :] < K)
    for t in range(tl.where(alive, 0, count)):  # no place in the pool: zeros
        for c in range(0, V, BV):
            tl.store(o + (first_row + t * H) * V + c + few, few * 0.0, mask=c + few < V)
        if x is not None:
            tl.store(x + (first_row + t * H) * K + rows, rows * 0.0, mask=rows < K)
    place = tl.where(alive, place, 0)
    count = tl.where(alive, count, 0)
    u_at = u_pool + place * u_stride + head.to(tl.int64) * (K * V)
    h = tl.zeros([BK, BK], tl.float32)
    if h_pool is not None:
        h_at = h_pool + place * h_stride + head.to(tl.int64) * (K * K)
        h_at = h_at + rows[:, None] * K + cols[None, :]
        h = tl.load(h_at, mask=inside, other=0.0)
    if work is not None:
        work_at = work + (sequence * H + head) * (K * V)
    for t in range(count):
        token = begin + t
        write = load_number(beta, batch, token, head, strides[6], 1.0)
        key = write * load_vector(k, batch, token, head // (H // HK), strides[1], rows, K)
        z = load_vector(q, batch, token, head, strides[0], rows, K)
        row = first_row + t * H
        if h_pool is not None:
            other = write * load_vector(k, batch, token, head // (H // HK), strides[1], cols, K)
            gamma = tl.exp(load_number(gk, batch, token, head, strides[4], 0.0))
            h = gamma * h + key[:, None] * other[None, :]
            if SOLVE:
                square = tl.sum(tl.sum(h * h, 1), 0)
                empty = square < empty_below * empty_below
                fro = tl.sqrt(tl.where(empty, 1.0, square))
                right = tl.where(empty, 0.0, z)
                if stop is not None:
                    solution = solve_state(h, right, fro, ridge_ratio, stop, num_iter)
                else:
                    solution = solve(h, right, fro, ridge_ratio, num_iter, K, BK, ADAPTIVE)
                solution = tl.where(empty, 0.0, solution)
                if x is not None:
                    tl.store(x + row * K + rows, solution, mask=rows < K)
                share = load_number(alpha, batch, token, head, strides[5], 1.0)
                z = (1.0 - share) * z + share * solution
        gamma = tl.exp(load_number(g, batch, token, head, strides[3], 0.0))
        z *= scale
        for c in range(0, V, BV):
            places = rows[:, None] * V + (c + few)[None, :]
            fits = (rows[:, None] < K) & ((c + few)[None, :] < V)
            if work is None:
                u = tl.load(u_at + places, mask=fits, other=0.0).to(tl.float32)
            else:
                if t == 0:
                    u = tl.load(u_at + places, mask=fits, other=0.0).to(tl.float32)
                else:
                    u = tl.load(work_at + places, mask=fits, other=0.0)
            value = load_vector(v, batch, token, head // (H // HV), strides[2], c + few, V)
            u = gamma * u + key[:, None] * (write * value)[None, :]
            tl.store(o + row * V + c + few, tl.sum(z[:, None] * u, 0), mask=c + few < V)
            if work is None:
                if COMMIT:
                    tl.store(u_at + places, u, mask=fits)
            else:
                if t < count - 1:
                    tl.store(work_at + places, u, mask=fits)
                elif COMMIT:
                    tl.store(u_at + places, u, mask=fits)
        tl.debug_barrier()  # the next token reads U
    if COMMIT and h_pool is not None:
        tl.store(h_at, h, mask=inside)


@triton.jit(do_not_specialize=["length", "pool"])
def advance_kernel(
    k,  # [B, T, HK, K], strided
    v,  # [B, T, HV, V], strided
    g,  # [B, T, H] float32 or None, strided
    gk,  # [B, T, H] or None
    beta,  # [B, T, H] or None
    h_pool,  # [P, H, K, K] float32
    u_pool,  # [P, H, K, V] float32 or bfloat16
    indices,  # [B] or None
    counts,  # [B]: tokens of each sequence
    strides,  # (batch, token, head) of k, v, g, gk, beta
    h_stride,
    u_stride,
    length,
    pool,
    H,
    HK,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    R: tl.constexpr,  # rows in a program
):
    """Decay and update of the first tokens of one sequence, R rows of one head's H and U."""
    sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    _, _, _, place, alive = place_of(indices, None, sequence, length, pool)
    count = tl.minimum(tl.load(counts + sequence), length).to(tl.int32)
    count = tl.where(alive, count, 0)
    place = tl.where(alive, place, 0)
    rows = tl.program_id(1) * R + tl.arange(0, R)
    h_cols, u_cols = tl.arange(0, BK), tl.arange(0, BV)
    some = rows[:, None] < tl.where(count > 0, K, 0)
    h_at = h_pool + place * h_stride + head.to(tl.int64) * (K * K)
    h_at = h_at + rows[:, None] * K + h_cols[None, :]
    u_at = u_pool + place * u_stride + head.to(tl.int64) * (K * V)
    u_at = u_at + rows[:, None] * V + u_cols[None, :]
    h = tl.load(h_at, mask=some & (h_cols[None, :] < K), other=0.0)
    u = tl.load(u_at, mask=some & (u_cols[None, :] < V), other=0.0).to(tl.float32)
    for t in range(count):
        write = load_number(beta, sequence, t, head, strides[4], 1.0)
        column = write * load_vector(k, sequence, t, head // (H // HK), strides[0], rows, K)
        key = write * load_vector(k, sequence, t, head // (H // HK), strides[0], h_cols, K)
        value = write * load_vector(v, sequence, t, head // (H // HV), strides[1], u_cols, V)
        h = tl.exp(load_number(gk, sequence, t, head, strides[3], 0.0)) * h
        u = tl.exp(load_number(g, sequence, t, head, strides[2], 0.0)) * u
        h += column[:, None] * key[None, :]
        u += column[:, None] * value[None, :]
    tl.store(h_at, h, mask=some & (h_cols[None, :] < K))
    tl.store(u_at, u, mask=some & (u_cols[None, :] < V))
