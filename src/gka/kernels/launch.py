"""From tokens to kernel launches: sizes, scratch memory and order. The kernels know nothing of these."""

# Triton declares a launch with the kernel's device types and without its launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gka.kernels.adjoint import readout_backward_kernel, through_h_kernel, through_u_kernel
from gka.kernels.chunked import readout_kernel, solve_kernel
from gka.kernels.moments import moments_kernel, moments_reverse_kernel
from gka.maths.adjoint import Gradients
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.ridge import empty_below

MAX_HEAD_DIM = 128  # beyond it the derivative's kernels outgrow shared memory
CHUNK_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Chunking:
    """Where sequences and chunks lie among the tokens, on the device.

    start int64 [M] and length int32 [M] of each chunk; first chunk int32 [N+1] and first token
    int64 [N+1] of each sequence.
    """

    start: Tensor
    length: Tensor
    first: Tensor
    bounds: Tensor
    num_chunks: int
    num_sequences: int


def chunking(tokens: Tokens, size: int) -> Chunking:
    batch, length = tokens.q.shape[:2]
    device = tokens.q.device
    packed = tokens.cu_seqlens
    bounds = torch.arange(batch + 1) * length if packed is None else packed.cpu().long()
    lengths = bounds.diff()
    counts = (lengths + size - 1) // size
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = (torch.arange(len(sequence)) - first[sequence]) * size
    start = bounds[sequence] + within
    valid = (lengths[sequence] - within).clamp(max=size)
    return Chunking(
        start.to(device, non_blocking=True),
        valid.int().to(device, non_blocking=True),
        first.int().to(device, non_blocking=True),
        bounds.to(device, non_blocking=True),
        len(sequence),
        len(counts),
    )


class Launch:
    """One call's sizes and launch configuration."""

    def __init__(self, tokens: Tokens, settings: Settings) -> None:
        given = vars(tokens).items()
        t = self.t = Tokens(**{n: None if x is None else x.contiguous() for n, x in given})
        self.settings = settings
        _, _, self.H, self.K = t.q.shape
        self.V = t.v.shape[-1]
        self.HK, self.HV = t.k.shape[2], t.v.shape[2]
        if max(self.K, self.V) > MAX_HEAD_DIM or settings.chunk_size not in CHUNK_SIZES:
            raise RuntimeError(
                f'backend="triton" runs head dimensions up to {MAX_HEAD_DIM} and chunk sizes '
                f"{CHUNK_SIZES}; got K = {self.K}, V = {self.V}, chunk_size = {settings.chunk_size}. "
                'Use backend="torch".'
            )
        self.BK = max(16, triton.next_power_of_2(self.K))
        # 64 columns a tile: 32 make triton 3.6 read past its shared memory in through_u_kernel
        self.BV = min(64, max(16, triton.next_power_of_2(self.V)))
        self.SB = min(32, self.BV)  # columns of U a program scans
        self.BN = min(32, max(16, triton.next_power_of_2(self.K)))  # columns of H a program scans
        self.NV, self.NK = triton.cdiv(self.V, self.BV), triton.cdiv(self.K, self.BN)
        self.C = settings.chunk_size
        self.exact = t.q.dtype == torch.float32
        self.OP = tl.float32 if self.exact else tl.float16
        self.op_dtype = torch.float32 if self.exact else torch.float16
        self.wide_dtype = torch.float32 if self.exact else torch.bfloat16  # range before precision
        self.PREC = "tf32x3" if self.exact else "tf32"
        self.warps = 4
        self.chunks = chunking(t, self.C)
        self.M, self.N = self.chunks.num_chunks, self.chunks.num_sequences
        self.gk = t.g if settings.tied else t.gk
        self.solve = settings.num_iter > 0

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.chunks.start, self.chunks.length

    @property
    def heads(self) -> dict:
        return {
            "H": self.H,
            "HK": self.HK,
            "HV": self.HV,
            "GK": self.H // self.HK,
            "GV": self.H // self.HV,
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.t.q.device, dtype=dtype)

    def like(self, x: Tensor | None) -> Tensor | None:
        """Scratch for a gate's gradient, float32."""
        return None if x is None else self.empty(*x.shape)

    def moments(self, values: Tensor, g: Tensor | None, s0: Tensor | None, is_h: bool):
        """Chunk-start states [M,H,K,V], their scales and squared norms, final states."""
        width = values.shape[-1]
        block = self.BN if is_h else self.SB
        blocks = triton.cdiv(width, block)
        states = self.empty(self.M, self.H, self.K, width, dtype=self.op_dtype)
        scales, norms = (self.empty(self.M, self.H, blocks) for _ in range(2))
        final = self.empty(self.N, self.H, self.K, width)
        s0_scale = None if s0 is None else s0.abs().amax((-1, -2)).contiguous()
        shared = values.shape[2]
        moments_kernel[(self.N * self.H, blocks)](
            self.t.k, values, g, self.t.beta, s0, s0_scale, states, scales, norms, final,
            self.chunks.bounds, self.chunks.first,
            H=self.H, HK=self.HK, HV=shared, GK=self.H // self.HK, GV=self.H // shared,
            K=self.K, V=width, BK=self.BK, BV=block, C=self.C, IS_H=is_h, OP=self.OP, PREC=self.PREC,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return states, scales, norms, final

    def moments_h(self):
        return self.moments(self.t.k, self.gk, self.t.h0, True)

    def moments_u(self):
        return self.moments(self.t.v, self.t.g, self.t.u0, False)

    def options(self, *names: str) -> dict:
        """Compile-time sizes by name, and the launch configuration."""
        sizes = {
            **self.heads, "K": self.K, "V": self.V, "BK": self.BK, "BV": self.BV, "NK": self.NK,
            "NV": self.NV, "SB": self.SB,
        }  # fmt: skip
        chosen = {name: sizes[name] for name in names}
        return chosen | {"C": self.C, "OP": self.OP, "PREC": self.PREC, "num_stages": 1}

    def solve_(self, rhs: Tensor, out: Tensor, h, *adjoint: Tensor) -> None:
        """x = p_r(A) rhs into `out`; `adjoint` are the extra arrays of the derivative."""
        t, s = self.t, self.settings
        extra = adjoint or (None,) * 5
        solve_kernel[(self.M * self.H,)](
            rhs, t.k, self.gk, t.beta, *h, out, *extra, *self.tables, s.ridge_ratio, s.num_iter,
            empty_below(torch.float32), ADJOINT=bool(adjoint), num_warps=self.warps,
            **self.options("H", "HK", "GK", "K", "BK", "NK"),
        )  # fmt: skip


READOUT = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BV", "NV", "SB")


def chunk_forward(tokens: Tokens, settings: Settings) -> Forward:
    """`gka.maths.chunked.chunk_forward` on the GPU."""
    run = Launch(tokens, settings)
    t = run.t
    *h, h_final = run.moments_h() if run.solve or settings.with_h else (None, None)
    u, u_scales, _, u_final = run.moments_u()
    # float32: the readout of a ridge solution cancels, and 16 bits of x cost 5 times the error of o
    x = run.empty(*t.q.shape) if run.solve else None
    if x is not None:
        run.solve_(t.q, x, h)
    o = run.empty(*t.q.shape[:3], run.V, dtype=t.q.dtype)
    readout_kernel[(run.M * run.H,)](
        t.q, x, t.k, t.v, t.g, t.alpha, t.beta, u, u_scales, o, *run.tables, settings.scale,
        num_warps=run.warps, **run.options(*READOUT),
    )  # fmt: skip
    return Forward(o=o, x=x, h=h_final, u=u_final)


def chunk_backward(
    tokens: Tokens,
    x: Tensor | None,
    do: Tensor,
    dh_final: Tensor | None,
    du_final: Tensor | None,
    settings: Settings,
) -> Gradients:
    """`gka.maths.adjoint.chunk_backward` on the GPU."""
    run = Launch(tokens, settings)
    t, do = run.t, do.contiguous()
    through_h = run.solve or dh_final is not None
    h = run.moments_h()[:3] if through_h else (None,) * 3
    u, u_scales = run.moments_u()[:2]
    grid = (run.M * run.H,)
    # through the readout
    dq, dalpha = torch.empty_like(t.q), run.like(t.alpha)
    if dalpha is not None and not run.solve:
        dalpha.zero_()
    y = run.empty(*t.q.shape, dtype=run.wide_dtype) if run.solve else None
    readout_backward_kernel[grid](
        t.q, x, t.k, t.v, t.g, t.alpha, t.beta, do, u, u_scales, y, dq, dalpha,
        *run.tables, settings.scale, num_warps=run.warps, **run.options(*READOUT),
    )  # fmt: skip
    dk = run.empty(*t.q.shape, dtype=torch.float32 if run.HK < run.H else t.q.dtype)
    dv = run.empty(*t.q.shape[:3], run.V, dtype=torch.float32 if run.HV < run.H else t.q.dtype)
    dg_u, dbeta2 = run.like(t.g), run.like(t.beta)
    ends, du0 = _reverse(run, (t.q, x, t.alpha, do), t.g, du_final, settings.scale, run.V)
    through_u_kernel[grid](
        t.q, x, t.k, t.v, t.g, t.alpha, t.beta, do, u, u_scales, ends, dk, dv, dg_u, dbeta2,
        *run.tables, settings.scale, num_warps=2 * run.warps, **run.options(*READOUT),
    )  # fmt: skip
    del ends, u
    # through the solve
    dg_h, dh0 = run.like(run.gk), None
    if through_h:
        ridge, w_t = (None,) * 5, None
        if run.solve:
            w_t, key_weight = (run.empty(*t.q.shape[:3]) for _ in range(2))
            start_weight = run.empty(run.M, run.H)
            run.solve_(y, y, h, x, dq, w_t, key_weight, start_weight)
            ridge = (t.k, key_weight, start_weight, *h[:2])
        if dh_final is not None:
            dh_final = (dh_final + dh_final.transpose(-1, -2)) / 2
        ends, dh0 = _reverse(run, (None, x, None, y), run.gk, dh_final, -0.5, run.K, ridge)
        through_h_kernel[grid](
            x, y, w_t, ridge[1], t.k, run.gk, t.beta, *h, ends, dk, dg_h, dbeta2, *run.tables,
            SOLVE=run.solve, num_warps=2 * run.warps,
            **run.options("H", "HK", "GK", "K", "BK", "NK"),
        )  # fmt: skip
    elif dg_h is not None:
        dg_h.zero_()
    return _collect(run, dq, dk, dv, dg_u, dg_h, dalpha, dbeta2, dh0, du0)


def _reverse(run: Launch, arrays, g, final, factor, width, ridge=(None,) * 5):
    """Gradients of the states at chunk ends [M,H,K,width] and of the initial state."""
    block = run.SB if arrays[0] is not None else run.BN
    ends = run.empty(run.M, run.H, run.K, width, dtype=run.wide_dtype)
    initial = run.empty(run.N, run.H, run.K, width)
    final = None if final is None else final.float().contiguous()
    moments_reverse_kernel[(run.N * run.H, triton.cdiv(width, block))](
        *arrays, *ridge, g, final, ends, initial, run.chunks.bounds, run.chunks.first, factor,
        H=run.H, HK=run.HK, GK=run.H // run.HK, K=run.K, V=width, BK=run.BK, BV=block, C=run.C,
        RIDGE=ridge[0] is not None, LOCAL=arrays[3] is not None, OP=run.OP, PREC=run.PREC,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return ends, initial


def _collect(run: Launch, dq, dk, dv, dg_u, dg_h, dalpha, dbeta2, dh0, du0) -> Gradients:
    """Sums over heads that share, gates in their dtypes."""
    t = run.t

    def shared(grad: Tensor, like: Tensor) -> Tensor:
        heads = like.shape[2]
        if heads < run.H:
            grad = grad.unflatten(2, (heads, run.H // heads)).sum(3)
        return grad.to(like.dtype)

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if like is None or grad is None else grad.to(like.dtype)

    if run.settings.tied and dg_u is not None and dg_h is not None:
        dg_u = dg_u + dg_h
    dbeta = None if dbeta2 is None or t.beta is None else 2.0 * t.beta.float() * dbeta2
    if t.h0 is not None and dh0 is None:
        dh0 = torch.zeros_like(t.h0)
    return Gradients(
        q=dq,
        k=shared(dk, t.k),
        v=shared(dv, t.v),
        g=cast(dg_u, t.g),
        gk=cast(dg_h, t.gk),
        alpha=cast(dalpha, t.alpha),
        beta=cast(dbeta, t.beta),
        h0=cast(dh0, t.h0),
        u0=cast(du0, t.u0),
    )
