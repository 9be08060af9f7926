"""One call of the op on a GPU: its sizes, tables and scratch memory, and the launches both passes share."""

# With a solve there are H and the adjoint's arrays; the types do not tell.
# pyright: reportArgumentType=false

from functools import cached_property, partial
from math import lcm
from typing import Any

import torch
from torch import Tensor

from gka.kernels import configs
from gka.kernels.arrays import Certificate, Heads, Maxima, Moments
from gka.kernels.chunked import solve_kernel
from gka.kernels.hopper import calls as hopper
from gka.kernels.inputs import Boundary, boundary, prepared
from gka.kernels.moments import moments_kernel, moments_segments_kernel
from gka.kernels.nystroem import certify_kernel
from gka.kernels.plan import Kind, Plan, plan_of
from gka.kernels.tables import chunking
from gka.maths.chunked import Settings, Tokens
from gka.maths.ridge import empty_below


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
        t = self.t = prepared(tokens, self.hopper)
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

    def split_heads(self, chunk_heads: int) -> None:
        """Work on groups of heads from here on: scratch for one at a time, whole groups of shared heads.

        Args:
            chunk_heads: chunks times heads of a group, about.
        """
        shared = lcm(self.H // self.HK, self.H // self.HV)
        parts = max(1, -(-self.M * self.H // chunk_heads))
        count = min(self.H, -(-self.H // parts // shared) * shared)
        if count == self.H:
            return
        starts = range(0, self.H, count)
        self.groups = [Heads(base, min(count, self.H - base)) for base in starts]
        # other segments sum H in another order: its last bits could turn the adaptive solver's steps
        if self.hopper or self.settings.solver != "adaptive":
            self._set_tables(count)

    @cached_property
    def initial(self) -> tuple[Boundary, Boundary]:
        """Both initial states; held, since every group of heads reads the same addresses."""
        measured = not self.hopper  # those kernels find the largest entries themselves
        return boundary(self.t.h0, measured), boundary(self.t.u0, measured)

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
        sums_h = self.sums(heads, "h", self.K, self.NK, h is not None)
        sums_u = self.sums(heads, "u", self.V, self.NV, True)
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

    def sums(self, heads: Heads, name: str, width: int, blocks: int, wanted: bool):
        """Scratch for the states that segments add up to: sums, bounds (not for Hopper's), log decays."""
        if not wanted or not self.chunks.segmented:
            return None, None, None
        shape = (self.chunks.num_segments, heads.count)
        scales = None if self.hopper else self.scratch(f"{name} sum scales", *shape, blocks)
        decays = self.scratch(f"{name} sum decays", *shape, blocks)
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
        """x of A x = rhs into `out`, both with their scales; `adjoint`: the derivative's other arrays."""
        t, s = self.t, self.settings
        extra = adjoint or (None,) * 8
        adaptive = s.solver == "adaptive"
        certificate = self.certify(heads, h).args if adaptive else (None,) * 4
        args = (
            *rhs, t.k, self.gk, t.beta, *h.stored, h.norms, *out, *extra, *certificate, *self.tables,
            *self._system,
        )  # fmt: skip
        grid = (self.M * heads.count,)
        for part in ("plain", "deflated") if adaptive else ("all",):
            options = {"ADJOINT": bool(adjoint), "PART": part}
            self.launch(solve_kernel, "solve", grid, heads, args, **options)

    @property
    def _system(self) -> tuple[float, int, float]:
        s = self.settings
        return s.ridge_ratio, s.num_iter, empty_below(torch.float32)

    def certify(self, heads: Heads, h: Moments) -> Certificate:
        """N_t and the steps of every chunk, found alike in both passes, since H is summed alike."""
        t, shape, chunks = self.t, (*self.t.q.shape[:2], heads.count), (self.M, heads.count)
        found = Certificate(
            w=self.scratch("w", *shape, self.K, dtype=self.op_dtype),
            tau=self.scratch("tau", *shape),
            phi=self.scratch("phi", *chunks),
            steps=self.scratch("steps", *chunks, dtype=torch.int32),
        )
        args = (t.k, self.gk, t.beta, *h.stored, h.norms, *found.args, *self.tables, *self._system)
        self.launch(certify_kernel, "certify", (self.M * heads.count,), heads, args)
        return found


def _plan(t: Tokens, chunk_size: int) -> Plan:
    """The plan of such tokens, which configs.why_not has let pass."""
    (*_, heads, key_dim), value_dim = t.q.shape, t.v.shape[-1]
    counts, device = (heads, t.k.shape[2], t.v.shape[2]), t.q.device
    dims, capability = (key_dim, value_dim), configs.capability_of(device)
    return plan_of(Kind(counts, dims, t.q.dtype, chunk_size, device, capability))
