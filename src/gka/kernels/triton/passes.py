"""The steps of `gka.kernels.passes` in Triton: the kernels that each launches, and their arguments."""

# Triton declares a launch with the kernel's device types. H, x and the adjoint exist with a solve.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from typing import Any

import torch
import triton
from torch import Tensor

from gka.kernels.arrays import (
    BackwardArrays,
    Certificate,
    Ends,
    Group,
    Heads,
    Maxima,
    Moments,
    Solutions,
)
from gka.kernels.call import GpuCall, Sizes, limits
from gka.kernels.decode import inputs_of
from gka.kernels.passes import Launch
from gka.kernels.triton import decode
from gka.kernels.triton.certify import certify_kernel
from gka.kernels.triton.gradients import through_h_kernel, through_u_kernel
from gka.kernels.triton.plan import Jitted, Plan, plan_of
from gka.kernels.triton.readout import readout_backward_kernel, readout_kernel
from gka.kernels.triton.scan import moments_kernel, moments_segments_kernel
from gka.kernels.triton.scan_back import reverse_h_kernel, reverse_u_kernel
from gka.kernels.triton.solve import solve_kernel
from gka.maths.chunked import Settings, Tokens
from gka.maths.recurrent import States
from gka.maths.ridge import empty_below

EMPTY_BELOW = empty_below(torch.float32)

SegmentSums = tuple[Tensor | None, Tensor | None, Tensor | None]


class TritonPasses:
    """The steps in Triton: K and V up to 256, 16-bit and float32 inputs, every chip with a table."""

    replays = False  # Triton's launchers take tensors, not addresses
    float_gates = False
    measures_boundaries = True

    def scan_programs(self, sizes: Sizes) -> int:
        """One per block of columns of H and of U."""
        return sum(sizes.blocks)

    def segments_by_group(self, settings: Settings) -> bool:
        """Not where steps differ by chunk: other segments change H's last bits, and so perhaps its steps."""
        return not settings.adaptive

    def ends(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments
    ) -> tuple[Ends | None, Ends]:
        """Memory for E of H (None without H) and of U."""

        def of(name: str, width: int, blocks: int) -> Ends:
            shape = (call.M, heads.count)
            return Ends(
                call.scratch(f"{name} ends", *shape, call.K, width, dtype=call.sizes.op_dtype),
                call.scratch(f"{name} end scales", *shape, blocks),
                call.scratch(f"{name} wholes", *shape, blocks),
            )

        return None if h is None else of("h", call.K, call.NK), of("u", call.V, call.NV)

    def scan(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments, maxima: Maxima | None
    ) -> list[Launch]:
        """H (unless None) and U at chunk starts, final where wanted; the largest keys and values."""
        t, blocks = call.t, 0 if h is None else call.NK
        programs = (call.chunks.num_segments * heads.count, blocks + call.NV)
        sums_h = _segment_sums(call, heads, "h", call.K, call.NK) if h is not None else (None,) * 3
        sums_u = _segment_sums(call, heads, "u", call.V, call.NV)
        gates, launches = (call.gk, t.g, t.beta), []
        if call.chunks.segmented:
            args = (t.k, t.v, *gates, *sums_h, *sums_u, *call.segments)
            launches.append(
                _launch(call, moments_segments_kernel, "moments", programs, heads, args, NK=blocks)
            )
        of_h = (None,) * 4 if h is None else (*h.stored, h.norms, h.final)
        largest = (None, None) if maxima is None else (maxima.k, maxima.v)
        args = (
            t.k, t.v, *gates, *call.initial[0], *of_h, *call.initial[1], *u.stored, u.final, *largest,
            *sums_h, *sums_u, *call.segments,
        )  # fmt: skip
        there = (u.final is None, maxima is None)
        launches.append(
            _launch(call, moments_kernel, "moments", programs, heads, args, there, NK=blocks)
        )
        return launches

    def solve_and_readout(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments, solutions: Solutions, o: Tensor
    ) -> list[Launch]:  # fmt: skip
        """x_t if there is a solve, and o_t."""
        t = call.t
        solve = (
            [] if h is None or not call.solves else _solve(call, heads, (t.q, None), h, solutions)
        )
        args = (
            t.q, *solutions, t.k, t.v, t.g, t.alpha, t.beta, *u.stored, o, *call.tables,
            call.settings.scale,
        )  # fmt: skip
        return [*solve, _of_chunks(call, readout_kernel, "readout", heads, args)]

    def count_steps(
        self, call: GpuCall, heads: Heads, h: Moments, u: Moments, steps: Tensor
    ) -> list[Launch]:
        """Steps that "adaptive" or "cg" takes in each chunk and head, into int32 [M,H]."""
        if call.settings.solver == "cg":
            return _solve(call, heads, (call.t.q, None), h, call.solutions(), steps=steps)
        return [_certify(call, heads, h, _certificate(call, heads)._replace(steps=steps))]

    def adjoint(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """Adjoints of readout and mix, and the adjoint solve: dq, d alpha, `group.adjoint`."""
        t, heads, a, grads = call.t, group.heads, group.adjoint, back.grads
        dx = (None, None) if a is None else (a.y, a.y_scale)
        args = (
            t.q, *back.solutions, t.k, t.v, t.g, t.alpha, t.beta, back.do, *group.u.stored, *dx,
            grads.dq, grads.dalpha, group.start_u, *call.tables, call.settings.scale,
        )  # fmt: skip
        launches = [_of_chunks(call, readout_backward_kernel, "readout_backward", heads, args)]
        if a is not None:  # y overwrites dx
            extra = (
                *back.solutions, grads.dq, a.w_t, _fro(call, heads), a.start_h, a.key_weight, a.start_weight,
            )  # fmt: skip
            launches += _solve(call, heads, dx, group.h, dx, extra)
        return launches

    def scan_back(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """E of H and U at chunk ends, and the gradients of the initial states."""
        t, heads, a, maxima = call.t, group.heads, group.adjoint, group.maxima
        sums = _segment_sums(call, heads, "u", call.V, call.NV)
        args = (
            t.q, *back.solutions, t.alpha, back.do, t.g, *group.u.stored, *back.du_final,
            *group.ends_u, maxima.z, maxima.d, back.grads.du0, *sums, *call.segments,
            call.settings.scale,
        )  # fmt: skip
        launches = _both(call, reverse_u_kernel, "reverse_u", heads, call.NV, args)
        if group.h is None or group.ends_h is None:
            return launches
        x, of_scan = (None, None), (None,) * 6
        if a is not None:
            x = back.solutions
            of_scan = (a.y, a.y_scale, t.k, maxima.k, a.key_weight, a.start_weight)
        sums = _segment_sums(call, heads, "h", call.K, call.NK)
        args = (
            *x, *of_scan, call.gk, *group.h.stored, *back.dh_final, *group.ends_h, back.grads.dh0,
            *sums, *call.segments,
        )  # fmt: skip
        return launches + _both(call, reverse_h_kernel, "reverse_h", heads, call.NK, args)

    def gradients(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """Gradients of keys, values, decays and the write gate: through U, then through H."""
        t, heads, a, maxima = call.t, group.heads, group.adjoint, group.maxima
        h, grads, (dk, *of_dk), (dv, *of_dv) = group.h, back.grads, group.dk, group.dv
        args = (
            t.q, *back.solutions, t.k, t.v, t.g, t.alpha, t.beta, back.do, *group.ends_u,
            group.start_u, maxima.k, maxima.v, maxima.z, maxima.d, dk, dv, grads.dg_u, grads.dbeta2,
            *call.tables, call.settings.scale, *of_dk, *of_dv,
        )  # fmt: skip
        launches = [_of_chunks(call, through_u_kernel, "through_u", heads, args)]
        if h is None or group.ends_h is None:
            return launches
        x, of_tokens = (None, None), (None,) * 6
        if a is not None:
            x, of_tokens = back.solutions, (
                a.y, a.y_scale, a.w_t, _fro(call, heads), a.start_h, a.key_weight,
            )  # fmt: skip
        args = (
            *x, *of_tokens, t.k, call.gk, t.beta, *h.stored, h.norms, *group.ends_h, maxima.k, dk,
            grads.dg_h, grads.dbeta2, *call.tables, *of_dk,
        )  # fmt: skip
        more = {"SOLVE": call.solves}
        return [*launches, _of_chunks(call, through_h_kernel, "through_h", heads, args, **more)]

    def step(
        self, tokens: Tokens, settings: Settings, states: States, commit: bool, o: Tensor,
        x: Tensor | None,
    ) -> list[Launch]:  # fmt: skip
        """`maths.recurrent.step_`."""
        given = inputs_of(tokens, settings)
        (batch, length, heads, dim), value_dim = tokens.q.shape, tokens.v.shape[-1]
        bounds = tokens.cu_seqlens
        sequences = batch if bounds is None else bounds.numel() - 1
        # U between tokens may lie in the pool only if it is committed and float32
        apart = length > 1 and not (commit and states.u.dtype == torch.float32)
        shape = (sequences, heads, dim, value_dim)
        work = states.u.new_empty(shape, dtype=torch.float32) if apart else None
        h, block = states.h, decode.width(dim)
        num_iter, stop = limits(settings, torch.float32)
        args = (
            *given.values(), h, states.u, work, states.indices, bounds, o, x,
            tuple(decode.strides(y) for y in given.values()), 0 if h is None else h.stride(0),
            states.u.stride(0), settings.scale, settings.ridge_ratio, num_iter, EMPTY_BELOW, stop, length,
            states.u.shape[0], heads, tokens.k.shape[2], tokens.v.shape[2],
        )  # fmt: skip
        options = {
            "K": dim, "V": value_dim, "BK": block, "BV": min(decode.COLUMNS, decode.width(value_dim)),
            "COMMIT": commit, "SOLVE": settings.num_iter > 0,
            "ADAPTIVE": settings.solver == "adaptive", **decode.HELD[block],
        }  # fmt: skip
        return [Launch(Jitted(decode.step_kernel, options), (sequences * heads,), args)]

    def advance(
        self, tokens: Tokens, settings: Settings, states: States, counts: Tensor
    ) -> list[Launch]:
        """`maths.recurrent.advance_`."""
        given = inputs_of(tokens, settings)
        read = [given[name] for name in ("k", "v", "g", "gk", "beta")]
        (batch, length, heads, dim), value_dim = tokens.q.shape, tokens.v.shape[-1]
        h = states.h
        assert h is not None
        args = (
            *read, h, states.u, states.indices, counts, tuple(decode.strides(y) for y in read),
            h.stride(0), states.u.stride(0), length, states.u.shape[0], heads, tokens.k.shape[2],
            tokens.v.shape[2],
        )  # fmt: skip
        options = {
            "K": dim, "V": value_dim, "BK": decode.width(dim), "BV": decode.width(value_dim),
            "R": decode.ROWS, "num_warps": 4,
        }  # fmt: skip
        grid = (batch * heads, triton.cdiv(dim, decode.ROWS))
        return [Launch(Jitted(decode.advance_kernel, options), grid, args)]


def _plan(call: GpuCall) -> Plan:
    plan = call.held.get("plan")
    if plan is None:
        plan = call.held["plan"] = plan_of(call.sizes)
    return plan


def _launch(
    call: GpuCall, kernel, name: str, grid: tuple[int, ...], heads: Heads, args: tuple,
    there: tuple[bool, ...] = (), **more: Any,
) -> Launch:  # fmt: skip
    """A launch of the kernel on `args` and the heads; options by `name`, and `more`, at compile time.

    Args:
        there: which arguments exist, as far as the call's signature does not say it.
    """
    signature = (call.signature, call.chunks.segmented, heads, there)
    return Launch(_plan(call).launcher(kernel, name, signature, **more), grid, (*args, *heads))


def _of_chunks(call: GpuCall, kernel, name: str, heads: Heads, args: tuple, **more: Any) -> Launch:
    """A launch with a program per chunk and head."""
    return _launch(call, kernel, name, (call.M * heads.count,), heads, args, **more)


def _both(call: GpuCall, kernel, name: str, heads: Heads, blocks: int, args: tuple) -> list[Launch]:
    """Launches of a backward scan: the segments' sums if a sequence has several, then the scan."""
    programs = (call.chunks.num_segments * heads.count, blocks)
    kinds = (True, False) if call.chunks.segmented else (False,)
    return [_launch(call, kernel, name, programs, heads, args, SUM=only) for only in kinds]


def _segment_sums(call: GpuCall, heads: Heads, name: str, width: int, blocks: int) -> SegmentSums:
    """Partial sums of each segment's states: sums, bounds and log decays; None without segments."""
    if not call.chunks.segmented:
        return None, None, None
    shape = (call.chunks.num_segments, heads.count)
    scales = call.scratch(f"{name} sum scales", *shape, blocks)
    decays = call.scratch(f"{name} sum decays", *shape, blocks)
    return call.scratch(f"{name} sums", *shape, call.K, width), scales, decays


def _solve(
    call: GpuCall,
    heads: Heads,
    rhs: tuple[Tensor, Tensor | None],
    h: Moments,
    out: tuple[Tensor | None, Tensor | None],
    adjoint: tuple[Tensor | None, ...] = (),
    steps: Tensor | None = None,
) -> list[Launch]:
    """Solve A x = rhs into `out`, both with their scales.

    Args:
        adjoint: the backward pass's other arrays.
        steps: int32 [M,G] for the steps of conjugate gradients; None: scratch.
    """
    t, solver = call.t, call.settings.solver
    launches, parts, found = [], ("all",), (None,) * 4
    if solver == "adaptive":
        found, parts = _certificate(call, heads), ("plain", "deflated")
        launches.append(_certify(call, heads, h, found))
    elif solver == "cg":
        found = (None, None, None, _steps(call, heads) if steps is None else steps)
    args = (
        *rhs, t.k, call.gk, t.beta, *h.stored, h.norms, *out, *(adjoint or (None,) * 8), *found,
        *call.tables, *_system(call), call.stop,
    )  # fmt: skip
    for part in parts:
        options = {"ADJOINT": bool(adjoint), "PART": part, "GUARDED": call.small_ridge}
        launches.append(_of_chunks(call, solve_kernel, "solve", heads, args, **options))
    return launches


def _steps(call: GpuCall, heads: Heads) -> Tensor:
    return call.scratch("steps", call.M, heads.count, dtype=torch.int32)


def _fro(call: GpuCall, heads: Heads) -> Tensor:
    """F_t of the tokens of a group, from the adjoint solve to the gradients."""
    return call.scratch("fro", *call.t.q.shape[:2], heads.count)


def _system(call: GpuCall) -> tuple[float, int, float]:
    return call.settings.ridge_ratio, call.most_steps, EMPTY_BELOW


def _certificate(call: GpuCall, heads: Heads) -> Certificate:
    shape, chunks = (*call.t.q.shape[:2], heads.count), (call.M, heads.count)
    return Certificate(
        w=call.scratch("w", *shape, call.K, dtype=call.sizes.op_dtype),
        tau=call.scratch("tau", *shape),
        phi=call.scratch("phi", *chunks),
        steps=_steps(call, heads),
    )


def _certify(call: GpuCall, heads: Heads, h: Moments, found: Certificate) -> Launch:
    """N_t and the steps of every chunk; the same in both passes, since H is summed in the same order."""
    t = call.t
    args = (
        t.k, call.gk, t.beta, *h.stored, h.norms, *found, *call.tables, *_system(call),
    )  # fmt: skip
    return _of_chunks(call, certify_kernel, "certify", heads, args)


TRITON = TritonPasses()
