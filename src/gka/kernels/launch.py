"""From tokens to kernel launches: sizes, scratch memory and order. The kernels know nothing of these."""

# With a solve there are x, H and the adjoint's arrays; the types do not tell.
# pyright: reportArgumentType=false

from dataclasses import dataclass
from functools import cached_property, partial
from math import lcm, prod
from typing import Any, overload

import torch
from torch import Tensor

from gka.kernels import configs
from gka.kernels.adjoint import readout_backward_kernel, through_h_kernel, through_u_kernel
from gka.kernels.chunked import readout_kernel, solve_kernel
from gka.kernels.hopper import calls as hopper
from gka.kernels.moments import moments_kernel, moments_segments_kernel
from gka.kernels.plan import Kind, Plan, plan_of
from gka.kernels.reverse import reverse_h_kernel, reverse_u_kernel
from gka.kernels.tables import chunking
from gka.maths.adjoint import Gradients
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.ridge import empty_below

Boundary = tuple[Tensor | None, Tensor | None]  # a state and the largest entry of each head

CHUNK_HEADS = 792  # chunks times heads that the derivative works on together: bounds its scratch


@dataclass(frozen=True)
class Moments:
    """H or U of some heads at chunk starts, and after the last chunk.

    Attributes:
        states: S_[c] / scale [M,G,K,width], in the operands' dtype.
        scales: a bound on |S_[c]| of every block of columns [M,G,blocks]; one for all blocks of H.
        norms: sums of S_[c]^2 over every block of columns [M,G,blocks]; H only.
        final: [N,H,K,width]; None where it is not wanted.
    """

    states: Tensor
    scales: Tensor
    norms: Tensor
    final: Tensor | None

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        return self.states, self.scales


@dataclass(frozen=True)
class Maxima:
    """Largest magnitudes in a chunk's rows: of k and z [M,G], of blocks of v and do [M,G,NV]."""

    k: Tensor
    v: Tensor
    z: Tensor
    d: Tensor


@dataclass(frozen=True)
class Ends:
    """Gradients of a state at chunk ends, divided by their scales, and decay * <S_[c], E> of every chunk."""

    states: Tensor
    scales: Tensor
    wholes: Tensor

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.states, self.scales, self.wholes


@dataclass(frozen=True)
class Adjoint:
    """What the solve's derivative leaves for the gradients: y and numbers per token or chunk, of G heads."""

    y: Tensor
    y_scale: Tensor
    w_t: Tensor
    start_h: Tensor
    key_weight: Tensor
    start_weight: Tensor


@dataclass(frozen=True)
class Heads:
    """G heads of the H, from head `base` on, that are worked on together."""

    base: int
    count: int

    @property
    def args(self) -> tuple[int, int]:
        return self.base, self.count


class Launch:
    """One call's sizes, tables and scratch memory.

    Attributes:
        given: the tokens as they came; t: contiguous and aligned, gates float32 for Hopper's kernels.
        hopper: whether those kernels do all the work.
        signature: what compiled kernels depend on beside the plan: which arguments there are, of what
            dtype, and the integers among them.
    """

    def __init__(self, tokens: Tokens, settings: Settings, on_hopper: bool) -> None:
        self.given, self.settings = tokens, settings
        self.solve = settings.num_iter > 0
        self.hopper = on_hopper and self.solve
        t = self.t = _prepared(tokens, self.hopper)
        plan = self.plan = _plan(t, settings.chunk_size)
        self.H, self.HK, self.HV, self.K, self.V = plan.H, plan.HK, plan.HV, plan.K, plan.V
        self.NK, self.NV, self.op_dtype = plan.NK, plan.NV, plan.op_dtype
        self.gk = t.g if settings.tied else t.gk
        self.groups = [Heads(0, self.H)]
        optional = (t.g, self.gk, t.alpha, t.beta, t.h0, t.u0)
        self.signature: tuple = (
            settings.num_iter,
            *(None if x is None else x.dtype for x in optional),
        )
        self._scratch: dict[str, Tensor] = {}
        self.arguments: dict = {}  # of Hopper's kernels, by name
        self._set_tables(self.H)

    def _set_tables(self, heads: int) -> None:
        # a Hopper block holds a whole state; two fit where three of the others' do
        programs = heads * (3 if self.hopper else self.NK + self.NV)
        self.chunks = chunking(self.t, self.plan.C, programs)
        self.M, self.N = self.chunks.num_chunks, self.chunks.num_sequences

    def split_heads(self) -> None:
        """Work on groups of heads from here on: scratch for one at a time, whole groups of shared heads."""
        shared = lcm(self.H // self.HK, self.H // self.HV)
        parts = max(1, -(-self.M * self.H // CHUNK_HEADS))
        count = min(self.H, -(-self.H // parts // shared) * shared)
        if count == self.H:
            return
        starts = range(0, self.H, count)
        self.groups = [Heads(base, min(count, self.H - base)) for base in starts]
        self._set_tables(count)

    @cached_property
    def initial(self) -> tuple[Boundary, Boundary]:
        """Both initial states; held, since every group of heads reads the same addresses."""
        return _initial(self.t.h0), _initial(self.t.u0)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.chunks.start, self.chunks.length

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.chunks.segments, self.chunks.bounds, self.chunks.start

    def launch(
        self, kernel, name: str, grid: tuple[int, ...], heads: Heads, args: tuple, **more: Any
    ) -> None:
        """Launch a kernel on `args`, the heads and, at compile time, the plan's sizes and `more`.

        Args:
            name: of the kernel's options.
        """
        signature = (self.signature, self.chunks.segmented, heads)
        self.plan.launcher(kernel, name, signature, **more)(grid, *args, *heads.args)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.t.q.device, dtype=dtype)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of that shape for the first group of heads; the next, no larger, reuse it under its name."""
        held = self._scratch.get(name)
        if held is None:
            held = self._scratch[name] = self.empty(*shape, dtype=dtype)
        return held

    def like(self, x: Tensor | None) -> Tensor | None:
        """Memory for a gate's gradient, float32."""
        return None if x is None else self.empty(*x.shape)

    def moments(
        self, heads: Heads, with_h: bool, maxima: Maxima | None = None
    ) -> tuple[Moments | None, Moments]:
        """H (unless not wanted) and U at chunk starts; final too where no maxima are asked for."""
        t = self.t
        new = partial(self._moments, heads, final=maxima is None)
        h = new("h", self.K, self.NK) if with_h else None
        u = new("u", self.V, self.NV)
        blocks = 0 if h is None else self.NK
        programs = (self.chunks.num_segments * heads.count, blocks + self.NV)
        sums_h = self._sums(heads, "h", self.K, self.NK, h is not None)
        sums_u = self._sums(heads, "u", self.V, self.NV, True)
        if self.hopper and h is not None:
            hopper.scan_states(self, heads, (h, u), self.initial, (sums_h, sums_u), maxima)
            return h, u
        gates = (self.gk, t.g, t.beta)
        if self.chunks.segmented:
            args = (t.k, t.v, *gates, *sums_h, *sums_u, *self.segments)
            self.launch(moments_segments_kernel, "moments", programs, heads, args, NK=blocks)
        of_h = (None,) * 4 if h is None else (*h.stored, h.norms, h.final)
        largest = (None, None) if maxima is None else (maxima.k, maxima.v)
        args = (
            t.k, t.v, *gates, *self.initial[0], *of_h, *self.initial[1], *u.stored, u.final, *largest,
            *sums_h, *sums_u, *self.segments,
        )  # fmt: skip
        self.launch(moments_kernel, "moments", programs, heads, args, NK=blocks)
        return h, u

    def _moments(self, heads: Heads, name: str, width: int, blocks: int, final: bool) -> Moments:
        shape = (self.M, heads.count)
        return Moments(
            self.scratch(name, *shape, self.K, width, dtype=self.op_dtype),
            self.scratch(f"{name} scales", *shape, blocks),
            self.scratch(f"{name} norms", *shape, blocks),
            self.empty(self.N, self.H, self.K, width) if final else None,
        )

    def _sums(self, heads: Heads, name: str, width: int, blocks: int, wanted: bool):
        """Scratch for the states that segments add up to: sums, bounds, log decays."""
        if not wanted or not self.chunks.segmented:
            return None, None, None
        shape = (self.chunks.num_segments, heads.count)
        scales, decays = (
            self.scratch(f"{name} sum {of}", *shape, blocks) for of in ("scales", "decays")
        )
        return self.scratch(f"{name} sums", *shape, self.K, width), scales, decays

    def maxima(self, heads: Heads) -> Maxima:
        shape = (self.M, heads.count)
        return Maxima(
            k=self.scratch("max k", *shape),
            v=self.scratch("max v", *shape, self.NV),
            z=self.scratch("max z", *shape),
            d=self.scratch("max do", *shape, self.NV),
        )

    def solve_(self, heads: Heads, rhs, h: Moments, out, *adjoint: Tensor) -> None:
        """x = p_r(A) rhs into `out`, both with their scales; `adjoint`: the derivative's other arrays."""
        t, s = self.t, self.settings
        extra = adjoint or (None,) * 7
        args = (
            *rhs, t.k, self.gk, t.beta, *h.stored, h.norms, *out, *extra, *self.tables,
            s.ridge_ratio, s.num_iter, empty_below(torch.float32),
        )  # fmt: skip
        grid = (self.M * heads.count,)
        self.launch(solve_kernel, "solve", grid, heads, args, ADJOINT=bool(adjoint))


def _plan(t: Tokens, chunk_size: int) -> Plan:
    """The plan of such tokens, which configs.why_not has let pass."""
    (*_, heads, key_dim), value_dim = t.q.shape, t.v.shape[-1]
    counts, device = (heads, t.k.shape[2], t.v.shape[2]), t.q.device
    dims, capability = (key_dim, value_dim), configs.capability_of(device)
    return plan_of(Kind(counts, dims, t.q.dtype, chunk_size, device, capability))


def _prepared(tokens: Tokens, float_gates: bool) -> Tokens:
    """Contiguous and aligned, as compiled kernels take for granted."""
    t = tokens

    def gate(x: Tensor | None) -> Tensor | None:
        x = _aligned(x)
        return None if x is None else x.float() if float_gates else x

    return Tokens(
        _aligned(t.q), _aligned(t.k), _aligned(t.v), gate(t.g), gate(t.gk), gate(t.alpha), gate(t.beta),
        _aligned(t.h0), _aligned(t.u0), t.cu_seqlens, t.cu_seqlens_cpu,
    )  # fmt: skip


@overload
def _aligned(x: Tensor) -> Tensor: ...
@overload
def _aligned(x: None) -> None: ...
@overload
def _aligned(x: Tensor | None) -> Tensor | None: ...
def _aligned(x: Tensor | None) -> Tensor | None:
    """x, contiguous; a copy where its memory does not start at 16 bytes (a view into a larger tensor)."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _initial(state: Tensor | None) -> Boundary:
    """A boundary state [N,H,K,V] as float32, and the largest entry of each head."""
    if state is None:
        return None, None
    state = _aligned(state.float())
    return state, state.abs().amax((-1, -2))


def chunk_forward(tokens: Tokens, settings: Settings, on_hopper: bool = False) -> Forward:
    """`gka.maths.chunked.chunk_forward` on the GPU; rows of x are divided by `x_scale`.

    `on_hopper`: scans, solve and readout by the kernels of `gka.kernels.hopper`.
    """
    run = Launch(tokens, settings, on_hopper)
    t, (heads,) = run.t, run.groups
    h, u = run.moments(heads, run.solve or settings.with_h)
    x = x_scale = None
    if run.solve:
        x, x_scale = run.empty(*t.q.shape, dtype=run.op_dtype), run.empty(*t.q.shape[:3])
    o = run.empty(*t.q.shape[:3], run.V, dtype=t.q.dtype)
    if run.hopper:
        assert h is not None and x is not None and x_scale is not None
        hopper.solve_and_readout(run, heads, h, u, x, x_scale, o)
        return Forward(o=o, x=x, h=h.final, u=u.final, x_scale=x_scale)
    if run.solve:
        run.solve_(heads, (t.q, None), h, (x, x_scale))
    args = (
        t.q, x, x_scale, t.k, t.v, t.g, t.alpha, t.beta, *u.stored, o, *run.tables, settings.scale,
    )  # fmt: skip
    run.launch(readout_kernel, "readout", (run.M * run.H,), heads, args)
    return Forward(o=o, x=x, h=None if h is None else h.final, u=u.final, x_scale=x_scale)


def chunk_backward(
    tokens: Tokens,
    x: Tensor | None,
    x_scale: Tensor | None,
    do: Tensor,
    dh_final: Tensor | None,
    du_final: Tensor | None,
    settings: Settings,
    on_hopper: bool = False,
) -> Gradients:
    """`gka.maths.adjoint.chunk_backward` on the GPU; x and x_scale as `chunk_forward` gave them."""
    run = Launch(tokens, settings, on_hopper)
    run.split_heads()
    if x is not None and x_scale is None:  # of the recurrent form
        x_scale = x.abs().amax(-1)
        x = (x / x_scale.clamp_min(1e-37)[..., None]).to(run.op_dtype)
    x, x_scale, do = _aligned(x), _aligned(x_scale), _aligned(do)
    back = _Backward(run, x, x_scale, do, _initial(dh_final), _initial(du_final))
    for heads in run.groups:
        back.through(heads)
    return back.collect()


class _Backward:
    """The caller's gradients and the order in which a group of heads adds its part to them."""

    def __init__(self, run: Launch, x, x_scale, do: Tensor, dh_final, du_final) -> None:
        self.run, self.x, self.x_scale, self.do = run, x, x_scale, do
        self.dh_final, self.du_final = dh_final, du_final
        self.with_h = run.solve or dh_final[0] is not None
        t = run.t
        run.signature = (*run.signature, do.dtype, dh_final[0] is None, du_final[0] is None)
        self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (t.q, t.k, t.v))
        self.dg_u, self.dbeta2, self.dalpha = run.like(t.g), run.like(t.beta), run.like(t.alpha)
        self.dg_h = run.like(run.gk)
        if self.dalpha is not None and not run.solve:
            self.dalpha.zero_()
        if self.dg_h is not None and not self.with_h:
            self.dg_h.zero_()
        self.du0 = None if t.u0 is None else run.empty(*t.u0.shape)
        self.dh0 = None if t.h0 is None or not self.with_h else run.empty(*t.h0.shape)

    def through(self, heads: Heads) -> None:
        """All of a group's gradients."""
        run = self.run
        maxima = run.maxima(heads)
        h, u = run.moments(heads, self.with_h, maxima)
        start_u = run.scratch("start u", *run.t.q.shape[:2], heads.count)
        adjoint = self._adjoint(heads)
        if run.hopper:
            solutions, grads = (self.x, self.x_scale), (self.dq, self.dalpha)
            hopper.adjoint(run, heads, h, u, solutions, self.do, grads, adjoint, start_u)
        else:
            self._readout(heads, u, start_u, adjoint)
        dk, dv = self._shared_heads(heads)
        if run.hopper:
            self._on_hopper(heads, h, u, maxima, adjoint, start_u, (dk[0], dv[0]))
        else:
            self._through_u(heads, u, maxima, start_u, dk, dv)
            if h is not None:
                self._through_h(heads, h, maxima, adjoint, dk)
        for grad, part, of in ((self.dk, dk, run.HK), (self.dv, dv, run.HV)):
            if of < run.H:
                first, share = heads.base * of // run.H, run.H // of
                shape = (*grad.shape[:2], heads.count // share, share, grad.shape[-1])
                total = part[0].view(-1)[: prod(shape)].view(shape).sum(3)
                grad[:, :, first : first + heads.count // share] = total

    def _adjoint(self, heads: Heads) -> Adjoint | None:
        run = self.run
        if not run.solve:
            return None
        shape = (*run.t.q.shape[:2], heads.count)
        numbers = (run.scratch(f"adjoint {i}", *shape) for i in range(4))
        y = run.scratch("y", *shape, run.K, dtype=run.op_dtype)
        return Adjoint(y, *numbers, start_weight=run.scratch("start weight", run.M, heads.count))

    def _shared_heads(self, heads: Heads):
        """Where dk and dv go: (array, first head, heads); scratch where heads share, summed afterwards."""
        run = self.run
        places = []
        for grad, name, of in ((self.dk, "dk", run.HK), (self.dv, "dv", run.HV)):
            if of == run.H:
                places.append((grad, heads.base, run.H))
            else:
                shape = (*run.t.q.shape[:2], heads.count, grad.shape[-1])
                places.append((run.scratch(name, *shape), 0, heads.count))
        return places

    def _readout(self, heads: Heads, u: Moments, start_u: Tensor, adjoint: Adjoint | None) -> None:
        run, t = self.run, self.run.t
        dx = (None, None) if adjoint is None else (adjoint.y, adjoint.y_scale)
        args = (
            t.q, self.x, self.x_scale, t.k, t.v, t.g, t.alpha, t.beta, self.do, *u.stored, *dx, self.dq,
            self.dalpha, start_u, *run.tables, run.settings.scale,
        )  # fmt: skip
        grid = (run.M * heads.count,)
        run.launch(readout_backward_kernel, "readout_backward", grid, heads, args)

    def _on_hopper(
        self, heads: Heads, h: Moments | None, u: Moments, maxima: Maxima, adjoint: Adjoint | None,
        start_u: Tensor, grads: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Both reverse scans and the gradients through both moments; E of U takes the place of U."""
        assert h is not None and adjoint is not None and self.x is not None
        run, x = self.run, (self.x, self.x_scale)
        ends = self._ends(heads, "h"), self._ends(heads, "u", u.states)
        edges = (self.dh_final, self.dh0), (self.du_final, self.du0)
        sums = (
            run._sums(heads, "h", run.K, run.NK, True),
            run._sums(heads, "u", run.V, run.NV, True),
        )
        hopper.scan_back(run, heads, (h, u), ends, edges, sums, x, self.do, adjoint, maxima)
        tokens = {
            "d_o": self.do, "y": adjoint.y, "y_scale": adjoint.y_scale, "w": adjoint.w_t,
            "key_weight": adjoint.key_weight, "start_u": start_u, "start_h": adjoint.start_h,
        }  # fmt: skip
        out = {
            "dk": grads[0], "dv": grads[1], "dg": self.dg_u, "dgk": self.dg_h, "d_beta2": self.dbeta2,
        }  # fmt: skip
        hopper.gradients(run, heads, h, ends, maxima, x, tokens, out)

    def _through_u(self, heads: Heads, u: Moments, maxima: Maxima, start_u: Tensor, dk, dv) -> None:
        run, t = self.run, self.run.t
        ends = self._ends(heads, "")
        read = (t.q, self.x, self.x_scale, t.alpha, self.do, t.g, *u.stored, *self.du_final)
        sums = run._sums(heads, "u", run.V, run.NV, True)
        written = (*ends.stored, maxima.z, maxima.d, self.du0)
        factor = run.settings.scale
        self._scan(reverse_u_kernel, heads, run.NV, read, written, sums, "reverse_u", factor)
        args = (
            t.q, self.x, self.x_scale, t.k, t.v, t.g, t.alpha, t.beta, self.do, *ends.stored, start_u,
            maxima.k, maxima.v, maxima.z, maxima.d, dk[0], dv[0], self.dg_u, self.dbeta2, *run.tables,
            run.settings.scale, *dk[1:], *dv[1:],
        )  # fmt: skip
        run.launch(through_u_kernel, "through_u", (run.M * heads.count,), heads, args)

    def _through_h(
        self, heads: Heads, h: Moments, maxima: Maxima, adjoint: Adjoint | None, dk
    ) -> None:
        run, t, a = self.run, self.run.t, adjoint
        x, of_tokens, of_scan = (None, None), (None,) * 5, (None,) * 6
        if a is not None:
            x, y = (self.x, self.x_scale), (a.y, a.y_scale)
            numbers = (a.w_t, a.start_h, a.key_weight)
            run.solve_(heads, y, h, y, *x, self.dq, *numbers, a.start_weight)
            of_tokens = (*y, *numbers)
            of_scan = (*y, t.k, maxima.k, a.key_weight, a.start_weight)
        ends = self._ends(heads, "")  # the memory of E of U, which is done with
        sums = run._sums(heads, "h", run.K, run.NK, True)
        read = (*x, *of_scan, run.gk, *h.stored, *self.dh_final)
        written = (*ends.stored, self.dh0)
        self._scan(reverse_h_kernel, heads, run.NK, read, written, sums, "reverse_h")
        args = (
            *x, *of_tokens, t.k, run.gk, t.beta, *h.stored, h.norms, *ends.stored, maxima.k, dk[0],
            self.dg_h, self.dbeta2, *run.tables, *dk[1:],
        )  # fmt: skip
        grid = (run.M * heads.count,)
        run.launch(through_h_kernel, "through_h", grid, heads, args, SOLVE=run.solve)

    def _ends(self, heads: Heads, name: str, states: Tensor | None = None) -> Ends:
        """Memory for E of either state, in the place of `states` if given; one name is one memory."""
        run, shape = self.run, (self.run.M, heads.count)
        width, blocks = max(run.K, run.V), max(run.NK, run.NV)
        if states is None:
            states = run.scratch(f"{name} ends", *shape, run.K, width, dtype=run.op_dtype)
        scales, wholes = (
            run.scratch(f"{name} {of}", *shape, blocks) for of in ("end scales", "wholes")
        )
        return Ends(states, scales, wholes)

    def _scan(
        self, kernel, heads: Heads, blocks: int, read, written, sums, name: str, *factor
    ) -> None:
        """Both passes of a reverse scan."""
        run = self.run
        programs = (run.chunks.num_segments * heads.count, blocks)
        args = (*read, *written, *sums, *run.segments, *factor)
        if run.chunks.segmented:
            run.launch(kernel, name, programs, heads, args, SUM=True)
        run.launch(kernel, name, programs, heads, args, SUM=False)

    def collect(self) -> Gradients:
        """Gradients in their inputs' dtypes."""
        t, dg_u, dg_h = self.run.given, self.dg_u, self.dg_h
        if self.run.settings.tied and dg_u is not None and dg_h is not None:
            dg_u += dg_h
        dbeta = None
        if self.dbeta2 is not None and t.beta is not None:
            dbeta = self.dbeta2.mul_(t.beta).mul_(2.0)
        dh0 = self.dh0
        if dh0 is not None:  # H is symmetric, and so is its gradient
            dh0 = (dh0 + dh0.transpose(-1, -2)) / 2
        elif t.h0 is not None:
            dh0 = torch.zeros_like(t.h0)

        def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if like is None or grad is None else grad.to(like.dtype)

        return Gradients(
            q=self.dq,
            k=self.dk,
            v=self.dv,
            g=cast(dg_u, t.g),
            gk=cast(dg_h, t.gk),
            alpha=cast(self.dalpha, t.alpha),
            beta=cast(dbeta, t.beta),
            h0=cast(dh0, t.h0),
            u0=cast(self.du0, t.u0),
        )
