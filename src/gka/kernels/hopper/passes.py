"""The steps of `gka.kernels.passes` in CUDA C++: argument structures filled from a call's arrays."""

# Every call here has a solve, so H, x and the adjoint's arrays exist; the types do not say so.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from gka.kernels.arrays import BackwardArrays, Ends, Group, Heads, Maxima, Moments, Solutions
from gka.kernels.call import GpuCall, Sizes, limits
from gka.kernels.decode import inputs_of
from gka.kernels.hopper import build
from gka.kernels.hopper.arguments import (
    VIEWS,
    Arguments,
    ScanArguments,
    Side,
    StepArguments,
    View,
    copy,
    fill,
)
from gka.kernels.passes import Launch
from gka.maths.chunked import Settings, Tokens
from gka.maths.recurrent import States
from gka.maths.ridge import empty_below

EMPTY_BELOW = empty_below(torch.float32)


class HopperPasses:
    """The steps on Hopper: K and V 64 or 128, 16-bit inputs, chunks of 64 tokens, and a solve."""

    replays = True
    float_gates = True
    measures_boundaries = False  # the scans find the largest entries themselves

    def scan_programs(self, sizes: Sizes) -> int:
        """One block per state: two of them fit where three of Triton's programs do."""
        return 3

    def segments_by_group(self, settings: Settings) -> bool:
        return True

    def ends(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments
    ) -> tuple[Ends | None, Ends]:
        """Memory for E of H; E of U overwrites U, unless U is kept."""
        shape = (call.M, heads.count)

        def of(name: str, states: Tensor, blocks: int) -> Ends:
            scales, wholes = (
                call.scratch(f"{name} {what}", *shape, blocks) for what in ("end scales", "wholes")
            )
            return Ends(states, scales, wholes)

        dtype, ends_u = call.sizes.op_dtype, u.start
        ends_h = call.scratch("h ends", *shape, call.K, call.K, dtype=dtype)
        if call.kept is not None:
            ends_u = call.scratch("u ends", *shape, call.K, call.V, dtype=dtype)
        return of("h", ends_h, call.NK), of("u", ends_u, call.NV)

    def scan(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments, maxima: Maxima | None
    ) -> list[Launch]:
        """H and U at chunk starts, final states if wanted, largest keys and values: `scan.cu`."""
        t = call.t

        def given() -> dict:
            first, second = (None, None) if maxima is None else (maxima.k, maxima.v)
            return {
                "h": _side(call, heads, "h", call.gk, call.initial[0][0], h),
                "u": _side(call, heads, "u", t.g, call.initial[1][0], u),
                "k": t.k, "v": t.v, "beta": t.beta, "first_maxima": first, "second_maxima": second,
            }  # fmt: skip

        return _scan(call, heads, "states", given)

    def solve_and_readout(
        self, call: GpuCall, heads: Heads, h: Moments | None, u: Moments, solutions: Solutions, o: Tensor
    ) -> list[Launch]:  # fmt: skip
        """x_t and o_t of every token: `forward.cu`."""

        def given() -> dict:
            return _common(call, h, u) | {"o": o, "x": solutions.x, "x_scale": solutions.x_scale}

        return _of_chunks(call, heads, "forward", given)

    def count_steps(
        self, call: GpuCall, heads: Heads, h: Moments, u: Moments, steps: Tensor
    ) -> list[Launch]:
        """Steps that "adaptive" or "cg" takes in each chunk and head, counted by `forward.cu`."""
        x, x_scale = call.solutions()
        o = call.empty(*call.t.q.shape[:3], call.V, dtype=call.t.q.dtype)

        def given() -> dict:
            return _common(call, h, u) | {"o": o, "x": x, "x_scale": x_scale, "steps": steps}

        return _of_chunks(call, heads, "forward", given)

    def adjoint(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """Adjoints of readout and mix, and the adjoint solve: `adjoint.cu`."""

        def given() -> dict:
            a, (x, x_scale) = group.adjoint, back.solutions
            return _common(call, group.h, group.u) | {
                "x": x, "x_scale": x_scale, "d_o": back.do, "dq": back.grads.dq,
                "d_alpha": back.grads.dalpha, "y": a.y, "y_scale": a.y_scale, "w": a.w_t,
                "key_weight": a.key_weight, "start_weight": a.start_weight,
                "start_u": group.start_u, "start_h": a.start_h,
            }  # fmt: skip

        return _of_chunks(call, group.heads, "adjoint", given)

    def scan_back(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """E of H (not symmetrised) and of U at chunk ends: `scan.cu`."""
        t, heads, grads = call.t, group.heads, back.grads

        def side(name, g, final, moments: Moments, ends: Ends, last) -> Side:
            made = _side(call, heads, name, g, final, Moments(ends.states, ends.scales, None, last))
            stored = {"stored": moments.start, "stored_bounds": moments.scales}
            return fill(made, stored | {"wholes": ends.wholes})

        def given() -> dict:
            a, maxima, (x, x_scale) = group.adjoint, group.maxima, back.solutions
            return {
                "h": side("h", call.gk, back.dh_final[0], group.h, group.ends_h, grads.dh0),
                "u": side("u", t.g, back.du_final[0], group.u, group.ends_u, grads.du0),
                "q": t.q, "k": t.k, "alpha": t.alpha, "beta": t.beta, "x": x, "x_scale": x_scale,
                "d_o": back.do, "y": a.y, "y_scale": a.y_scale, "key_weight": a.key_weight,
                "start_weight": a.start_weight, "first_maxima": maxima.z,
                "second_maxima": maxima.d, "key_maxima": maxima.k,
            }  # fmt: skip

        return _scan(call, heads, "back", given)

    def gradients(self, call: GpuCall, group: Group, back: BackwardArrays) -> list[Launch]:
        """Gradients of keys, values, decays and the write gate: `gradients.cu`.

        dk and dv of shared heads are float32 [B,T,G,D].
        """

        def given() -> dict:
            t, h, a, maxima = call.t, group.h, group.adjoint, group.maxima
            of_h, of_u, grads, (x, x_scale) = group.ends_h, group.ends_u, back.grads, back.solutions
            return _places(call) | {
                "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": call.gk, "alpha": t.alpha,
                "beta": t.beta, "h_start": h.start, "h_scales": h.scales, "h_norms": h.norms,
                "scale": call.settings.scale, "x": x, "x_scale": x_scale,
                "u_ends": of_u.states, "u_end_scales": of_u.scales, "u_wholes": of_u.wholes,
                "h_ends": of_h.states, "h_end_scales": of_h.scales, "h_wholes": of_h.wholes,
                "k_maxima": maxima.k, "v_maxima": maxima.v, "z_maxima": maxima.z,
                "d_maxima": maxima.d, "d_o": back.do, "y": a.y, "y_scale": a.y_scale, "w": a.w_t,
                "key_weight": a.key_weight, "start_u": group.start_u, "start_h": a.start_h,
                "dk": group.dk.array, "dv": group.dv.array, "dg": grads.dg_u, "dgk": grads.dg_h,
                "d_beta2": grads.dbeta2,
            }  # fmt: skip

        return _of_chunks(call, group.heads, "gradients", given)

    def step(
        self, tokens: Tokens, settings: Settings, states: States, commit: bool, o: Tensor,
        x: Tensor | None,
    ) -> list[Launch]:  # fmt: skip
        """`maths.recurrent.step_`: `decode.cu`, one block per sequence and head."""
        given, bounds = inputs_of(tokens, settings), tokens.cu_seqlens
        q, v = tokens.q, tokens.v
        bounds = None if bounds is None else bounds.long()
        sequences = q.shape[0] if bounds is None else bounds.numel() - 1
        dims = (q.shape[3], v.shape[3])
        solver = settings.solver if settings.num_iter > 0 else "chebyshev"
        kernel = build.step_kernel_of(q.device.index, dims, q.dtype, states.u.dtype, solver)
        arguments = step_arguments(given, bounds, settings, states, commit, o, x)
        keeps = (*given.values(), bounds)
        return [Launch(kernel, (sequences * q.shape[2], 1), (arguments,), keeps)]

    def advance(
        self, tokens: Tokens, settings: Settings, states: States, counts: Tensor
    ) -> list[Launch]:
        """`maths.recurrent.advance_` by Triton's kernel: without a solve there is nothing to gain here."""
        from gka.kernels.triton.passes import TRITON

        return TRITON.advance(tokens, settings, states, counts)


def _places(call: GpuCall) -> dict:
    """The fields of a launch that describe chunks and heads."""
    chunks = call.chunks
    return {
        "chunk_start": None if chunks.whole else chunks.start, "chunk_length": chunks.length,
        "heads": call.H, "key_heads": call.HK, "value_heads": call.HV, "first_chunk": 0,
    }  # fmt: skip


def _common(call: GpuCall, h: Moments, u: Moments) -> dict:
    """The fields that forward.cu and adjoint.cu read."""
    t, s = call.t, call.settings
    return _places(call) | {
        "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": call.gk, "alpha": t.alpha, "beta": t.beta,
        "h_start": h.start, "h_scales": h.scales, "h_norms": h.norms, "u_start": u.start,
        "u_scales": u.scales, "scale": s.scale, "ridge_ratio": s.ridge_ratio,
        "empty_below": EMPTY_BELOW, "num_iter": call.most_steps, "stop": call.stop or 0.0,
    }  # fmt: skip


def _solve_of(call: GpuCall) -> build.Solve:
    """The variant of the solve for this call."""
    return "cg, small ridge" if call.small_ridge else call.settings.solver


def _launch(
    call: GpuCall, kernel: str, blocks: tuple[int, int], arguments: ctypes.Structure
) -> Launch:
    q = call.t.q
    found = build.kernel_of(
        q.device.index, kernel, call.K, call.V, q.dtype == torch.bfloat16,
        _solve_of(call),
    )  # fmt: skip
    return Launch(found, blocks, (arguments,))


def _of_chunks(call: GpuCall, heads: Heads, kernel: str, given: Callable[[], dict]) -> list[Launch]:
    """A launch with a block per chunk and head."""
    blocks = call.M * heads.count
    if blocks == 0:
        return []
    return [_launch(call, kernel, (blocks, 1), _arguments(call, heads, kernel, Arguments, given))]


def _arguments(
    call: GpuCall, heads: Heads, kernel: str, structure: type, given: Callable[[], dict]
) -> ctypes.Structure:
    """A kernel's arguments: filled for the first group of heads, copied for the others with their heads."""
    held = call.held.get(kernel)
    if held is None:
        held = call.held[kernel] = fill(structure(), given())
    made = copy(held)
    made.first_head, made.group_heads = heads
    return made


def _side(
    call: GpuCall, heads: Heads, name: str, g: Tensor | None, boundary: Tensor | None, out: Moments
) -> Side:
    """H or U (or its gradient), scanned from `boundary` into `out`; with several segments also their sums."""
    sums = decays = None
    if call.chunks.segmented:
        shape = (call.chunks.num_segments, heads.count)
        width, blocks = (call.K, call.NK) if name == "h" else (call.V, call.NV)
        sums = call.scratch(f"{name} sums", *shape, call.K, width)
        decays = call.scratch(f"{name} sum decays", *shape, blocks)
    return fill(
        Side(),
        {
            "g": g, "boundary": boundary, "states": out.start, "bounds": out.scales,
            "norms": out.norms if name == "h" else None, "last": out.final, "sums": sums,
            "sum_decays": decays,
        },
    )  # fmt: skip


def _scan(call: GpuCall, heads: Heads, direction: str, given: Callable[[], dict]) -> list[Launch]:
    """The launches of a scan; with several segments first their sums, then the state before each."""
    chunks = call.chunks

    def all_given() -> dict:
        return given() | {
            "segments": chunks.segments, "chunk_start": chunks.start, "chunk_length": chunks.length,
            "scale": call.settings.scale, "heads": call.H, "key_heads": call.HK,
            "value_heads": call.HV, "segment_count": chunks.num_segments,
        }  # fmt: skip

    arguments = _arguments(call, heads, direction, ScanArguments, all_given)
    blocks = (chunks.num_segments * heads.count, 2)
    launches = []
    if chunks.segmented:
        entries = call.K * max(call.K, call.V) // 512 * heads.count
        launches.append(_launch(call, f"sums_{direction}", blocks, arguments))
        launches.append(_launch(call, f"combine_{direction}", (entries, 2), arguments))
    return [*launches, _launch(call, f"scan_{direction}", blocks, arguments)]


def step_arguments(
    given: dict[str, Tensor | None], bounds: Tensor | None, settings: Settings, states: States,
    commit: bool, o: Tensor, x: Tensor | None,
) -> StepArguments:  # fmt: skip
    """decode.cu's arguments. `given` holds VIEWS by name; `bounds`: of packed sequences, int64."""

    def pointer(y: Tensor | None) -> int | None:
        return None if y is None else y.data_ptr()

    def view(y: Tensor | None) -> View:
        return View() if y is None else View(y.data_ptr(), y.stride(0), y.stride(1), y.stride(2))

    q, k, v = given["q"], given["k"], given["v"]
    assert q is not None and k is not None and v is not None
    num_iter, stop = limits(settings, torch.float32)
    h, u, indices = states.h, states.u, states.indices
    pointers = (h, u, indices, bounds, o, x)
    return StepArguments(
        *(view(given[name]) for name in VIEWS),
        *map(pointer, pointers),
        0 if h is None else h.stride(0),
        u.stride(0),
        settings.scale,
        settings.ridge_ratio,
        EMPTY_BELOW,
        stop or 0.0,
        num_iter,
        q.shape[1],
        q.shape[2],
        k.shape[2],
        v.shape[2],
        u.shape[0],
        int(indices is not None and indices.dtype == torch.int64),
        int(commit),
    )


HOPPER = HopperPasses()
