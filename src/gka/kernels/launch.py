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
from gka.kernels.moments import moments_kernel, moments_segments_kernel
from gka.kernels.reverse import moments_reverse_kernel
from gka.kernels.tables import chunking
from gka.maths.adjoint import Gradients
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.ridge import empty_below

MAX_HEAD_DIM = 128  # beyond it the derivative's kernels outgrow shared memory
CHUNK_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Moments:
    """H or U at chunk starts and after the last.

    Attributes:
        states: S_[c] / scale [M,H,K,width], in the operands' dtype.
        scales: a bound on |S_[c]| of every block of columns [M,H,blocks]; one for all blocks of H.
        norms: sums of S_[c]^2 over every block of columns [M,H,blocks]; H only.
        final: [N,H,K,width].
        initial_scale: max |S_0| of each head [N,H], None without S_0.
    """

    states: Tensor
    scales: Tensor
    norms: Tensor
    final: Tensor
    initial_scale: Tensor | None

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        return self.states, self.scales


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
        self.SB = self.BV  # columns of U a program scans
        self.BN = min(64, self.BK)  # columns of H a program scans
        self.NV, self.NK = triton.cdiv(self.V, self.BV), triton.cdiv(self.K, self.BN)
        self.C = settings.chunk_size
        self.exact = t.q.dtype == torch.float32
        self.OP = tl.float32 if self.exact else tl.float16
        self.op_dtype = torch.float32 if self.exact else torch.float16
        self.wide_dtype = torch.float32 if self.exact else torch.bfloat16  # range before precision
        self.PREC = "tf32x3" if self.exact else "tf32"
        self.warps = 4
        self.chunks = chunking(t, self.C, self.H * (self.NK + self.NV))
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

    def moments(self, with_h: bool) -> tuple[Moments | None, Moments]:
        """H (unless not wanted) and U at chunk starts, and final."""
        t, sizes = self.t, self.options(*SCAN)
        h = self._states(self.K, self.NK, t.h0) if with_h else None
        u = self._states(self.V, self.NV, t.u0)
        sizes["NK"] = 0 if h is None else self.NK
        place = (self.chunks.segments, self.chunks.bounds, self.chunks.start)
        programs = (self.chunks.num_segments * self.H, sizes["NK"] + self.NV)
        launch = sizes | {"num_warps": 4, "num_stages": 3}
        sums = (None,) * 6
        if self.chunks.segmented:
            sums = (*self._sums(self.K, self.NK, h is not None), *self._sums(self.V, self.NV, True))
            moments_segments_kernel[programs](
                t.k, t.v, self.gk, t.g, t.beta, *sums, *place, 0, self.H, **launch
            )
        of_h = (None,) * 6 if h is None else (t.h0, h.initial_scale, *h.stored, h.norms, h.final)
        moments_kernel[programs](
            t.k, t.v, self.gk, t.g, t.beta, *of_h, t.u0, u.initial_scale, *u.stored, u.final,
            None, None, *sums, *place, 0, self.H, **launch,
        )  # fmt: skip
        return h, u

    def _states(self, width: int, blocks: int, initial: Tensor | None) -> Moments:
        shape = (self.M, self.H, blocks)
        return Moments(
            self.empty(self.M, self.H, self.K, width, dtype=self.op_dtype),
            self.empty(*shape),
            self.empty(*shape),
            self.empty(self.N, self.H, self.K, width),
            None if initial is None else initial.abs().amax((-1, -2)),
        )

    def _sums(self, width: int, blocks: int, wanted: bool) -> tuple[Tensor | None, ...]:
        """Scratch for the states that segments add up to: sums, bounds, log decays."""
        if not wanted:
            return None, None, None
        shape = (self.chunks.num_segments, self.H)
        scales, decays = self.empty(*shape, blocks), self.empty(*shape, blocks)
        return self.empty(*shape, self.K, width), scales, decays

    def options(self, *names: str) -> dict:
        """Compile-time sizes by name, and the launch configuration."""
        sizes = {
            **self.heads, "K": self.K, "V": self.V, "BK": self.BK, "BN": self.BN, "BV": self.BV,
            "NK": self.NK, "NV": self.NV, "SB": self.SB,
        }  # fmt: skip
        chosen = {name: sizes[name] for name in names}
        return chosen | {"C": self.C, "OP": self.OP, "PREC": self.PREC, "num_stages": 1}

    def solve_(self, rhs: Tensor, out: Tensor, h, *adjoint: Tensor) -> None:
        """x = p_r(A) rhs into `out`; `adjoint` are the extra arrays of the derivative."""
        t, s = self.t, self.settings
        extra = adjoint or (None,) * 5
        solve_kernel[(self.M * self.H,)](
            rhs, t.k, self.gk, t.beta, *h.stored, h.norms, out, *extra, *self.tables,
            s.ridge_ratio, s.num_iter, empty_below(torch.float32), ADJOINT=bool(adjoint), num_warps=self.warps,
            **self.options("H", "HK", "GK", "K", "BK", "NK"),
        )  # fmt: skip


SCAN = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BN", "BV", "NK", "NV")
READOUT = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BV", "NV", "SB")


def chunk_forward(tokens: Tokens, settings: Settings) -> Forward:
    """`gka.maths.chunked.chunk_forward` on the GPU."""
    run = Launch(tokens, settings)
    t = run.t
    h, u = run.moments(run.solve or settings.with_h)
    # float32: the readout of a ridge solution cancels, and 16 bits of x cost 5 times the error of o
    x = run.empty(*t.q.shape) if run.solve else None
    if x is not None:
        run.solve_(t.q, x, h)
    o = run.empty(*t.q.shape[:3], run.V, dtype=t.q.dtype)
    readout_kernel[(run.M * run.H,)](
        t.q, x, t.k, t.v, t.g, t.alpha, t.beta, *u.stored, o, *run.tables, settings.scale,
        num_warps=run.warps, **run.options(*READOUT),
    )  # fmt: skip
    return Forward(o=o, x=x, h=None if h is None else h.final, u=u.final)


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
    h, u = run.moments(through_h)
    grid = (run.M * run.H,)
    # through the readout
    dq, dalpha = torch.empty_like(t.q), run.like(t.alpha)
    if dalpha is not None and not run.solve:
        dalpha.zero_()
    y = run.empty(*t.q.shape, dtype=run.wide_dtype) if run.solve else None
    readout_backward_kernel[grid](
        t.q, x, t.k, t.v, t.g, t.alpha, t.beta, do, *u.stored, y, dq, dalpha,
        *run.tables, settings.scale, num_warps=run.warps, **run.options(*READOUT),
    )  # fmt: skip
    dk = run.empty(*t.q.shape, dtype=torch.float32 if run.HK < run.H else t.q.dtype)
    dv = run.empty(*t.q.shape[:3], run.V, dtype=torch.float32 if run.HV < run.H else t.q.dtype)
    dg_u, dbeta2 = run.like(t.g), run.like(t.beta)
    ends, du0 = _reverse(run, (t.q, x, t.alpha, do), t.g, du_final, settings.scale, run.V)
    through_u_kernel[grid](
        t.q, x, t.k, t.v, t.g, t.alpha, t.beta, do, *u.stored, ends, dk, dv, dg_u, dbeta2,
        *run.tables, settings.scale, num_warps=2 * run.warps, **run.options(*READOUT),
    )  # fmt: skip
    del ends, u
    # through the solve
    dg_h, dh0 = run.like(run.gk), None
    if h is not None:
        ridge, w_t = (None,) * 5, None
        if run.solve:
            w_t, key_weight = (run.empty(*t.q.shape[:3]) for _ in range(2))
            start_weight = run.empty(run.M, run.H)
            run.solve_(y, y, h, x, dq, w_t, key_weight, start_weight)
            ridge = (t.k, key_weight, start_weight, *h.stored)
        if dh_final is not None:
            dh_final = (dh_final + dh_final.transpose(-1, -2)) / 2
        ends, dh0 = _reverse(run, (None, x, None, y), run.gk, dh_final, -0.5, run.K, ridge)
        through_h_kernel[grid](
            x, y, w_t, ridge[1], t.k, run.gk, t.beta, *h.stored, h.norms, ends, dk, dg_h, dbeta2, *run.tables,
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
