"""The Hopper kernels in the place of their Triton counterparts: arguments from a call's sizes and scratch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gka.kernels import hopper
from gka.maths.ridge import empty_below

if TYPE_CHECKING:
    from gka.kernels.launch import Adjoint, Ends, Heads, Launch, Maxima, Moments

STAGGER = 20_000  # ns that one block of a pair waits once; tried from 5 to 30 us (docs/log.md)


def solve_and_readout(
    run: "Launch", heads: "Heads", h: "Moments", u: "Moments", x: Tensor, x_scale: Tensor, o: Tensor
) -> None:
    """x_t and o_t of every token: `forward.cu`."""
    given = _common(run, heads, h, u) | {"o": o, "x": x, "x_scale": x_scale}
    _run(run, heads, "forward", given)


def adjoint(
    run: "Launch",
    heads: "Heads",
    h: "Moments",
    u: "Moments",
    forward: tuple[Tensor, Tensor],
    do: Tensor,
    grads: tuple[Tensor, Tensor | None],
    out: "Adjoint",
    start_u: Tensor,
) -> None:
    """y_t, dq, d alpha and what the other gradients need of every token: `adjoint.cu`.

    Args:
        forward: x and x_scale as `solve_and_readout` left them.
        grads: dq and d alpha, written.
    """
    given = _common(run, heads, h, u) | {
        "x": forward[0], "x_scale": forward[1], "d_o": do, "dq": grads[0], "d_alpha": grads[1],
        "y": out.y, "y_scale": out.y_scale, "w": out.w_t, "key_weight": out.key_weight,
        "start_weight": out.start_weight, "start_u": start_u, "start_h": out.start_h,
    }  # fmt: skip
    _run(run, heads, "adjoint", given)


def _common(run: "Launch", heads: "Heads", h: "Moments", u: "Moments") -> dict:
    """What both kernels read; with the adaptive solver also what certify.cu finds of the states."""
    t, s = run.t, run.settings
    given = {
        "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": run.gk, "alpha": t.alpha, "beta": t.beta,
        "h_states": h.states, "h_scales": h.scales, "h_norms": h.norms, "u_states": u.states,
        "u_scales": u.scales, "chunk_start": run.chunks.start, "chunk_length": run.chunks.length,
        "scale": s.scale, "ridge_ratio": s.ridge_ratio, "empty_below": empty_below(torch.float32),
        "num_iter": s.num_iter, "heads": run.H, "key_heads": run.HK, "value_heads": run.HV,
        "first_head": heads.base, "group_heads": heads.count, "first_chunk": 0, "h_blocks": run.NK,
    }  # fmt: skip
    if s.solver == "adaptive":
        given["top"] = run.scratch("top", run.M, heads.count, 2, run.K)
        given["trace"] = run.scratch("trace", run.M, heads.count)
        _run(run, heads, "certify", given)
    return given


def _run(run: "Launch", heads: "Heads", kernel: str, given: dict) -> None:
    blocks = run.M * heads.count
    if blocks == 0:
        return
    multiprocessors = torch.cuda.get_device_properties(run.t.q.device).multi_processor_count
    resident = hopper.BLOCKS[max(run.K, run.V)] * multiprocessors
    # only long runs of blocks gain by the wait
    waiting = {
        "stagger": STAGGER if blocks >= 4 * resident else 0,
        "multiprocessors": multiprocessors,
    }
    arguments = hopper.fill(hopper.Arguments(), given | waiting)
    adaptive = run.settings.solver == "adaptive"
    hopper.run(kernel, run.t.q, run.V, adaptive, (blocks, 1), arguments)


Sums = tuple[Tensor | None, Tensor | None, Tensor | None]
Boundary = tuple[Tensor | None, Tensor | None]


def scan_states(
    run: "Launch",
    heads: "Heads",
    states: tuple["Moments", "Moments"],
    initial: tuple[Boundary, Boundary],
    sums: tuple[Sums, Sums],
    maxima: "Maxima | None",
) -> None:
    """H and U at chunk starts, and final: both passes of `scan.cu` forwards."""
    t = run.t
    sides = [
        _side(g, boundary, (s.states, s.scales, s.norms), s.final, parts)
        for g, s, boundary, parts in zip((run.gk, t.g), states, initial, sums, strict=True)
    ]
    largest = (None, None) if maxima is None else (maxima.k, maxima.v)
    given = {"h": sides[0], "u": sides[1], "k": t.k, "v": t.v, "beta": t.beta}
    given |= {"first_maxima": largest[0], "second_maxima": largest[1]}
    _scan(run, heads, "scan_states", given)


def scan_u_back(
    run: "Launch",
    heads: "Heads",
    u: "Moments",
    ends: "Ends",
    edges: tuple[Boundary, Tensor | None],
    sums: Sums,
    forward: tuple[Tensor, Tensor],
    do: Tensor,
    maxima: "Maxima",
) -> None:
    """The gradient of U at chunk ends; edges: final state's gradient, initial one's (written)."""
    t = run.t
    side = _side(t.g, edges[0], (ends.states, ends.scales, None), edges[1], sums)
    given = {
        "u": side, "q": t.q, "alpha": t.alpha, "x": forward[0], "x_scale": forward[1], "d_o": do,
        "stored": u.states, "stored_bounds": u.scales, "wholes": ends.wholes,
        "first_maxima": maxima.z, "second_maxima": maxima.d,
    }  # fmt: skip
    _scan(run, heads, "scan_u_back", given)


def scan_h_back(
    run: "Launch",
    heads: "Heads",
    h: "Moments",
    ends: "Ends",
    edges: tuple[Boundary, Tensor | None],
    sums: Sums,
    forward: tuple[Tensor, Tensor],
    of: "Adjoint",
) -> None:
    """The gradient E of H at chunk ends, not symmetrised; edges as in `scan_u_back`."""
    side = _side(run.gk, edges[0], (ends.states, ends.scales, None), edges[1], sums)
    given = {
        "h": side, "k": run.t.k, "x": forward[0], "x_scale": forward[1], "y": of.y,
        "y_scale": of.y_scale, "key_weight": of.key_weight, "start_weight": of.start_weight,
        "stored": h.states, "stored_bounds": h.scales, "wholes": ends.wholes,
    }  # fmt: skip
    _scan(run, heads, "scan_h_back", given)


def _side(
    g: Tensor | None, boundary: Boundary, out, last: Tensor | None, sums: Sums
) -> hopper.Side:
    names = ("g", "boundary", "boundary_max", "states", "bounds", "norms", "last", "sums")
    names = (*names, "sum_bounds", "sum_decays")
    side = hopper.Side()
    hopper.fill(side, dict(zip(names, (g, *boundary, *out, last, *sums), strict=True)))
    return side


def _scan(run: "Launch", heads: "Heads", kernel: str, given: dict) -> None:
    """First the segments' sums where a sequence has several, then the scan."""
    given |= {
        "segments": run.chunks.segments, "chunk_start": run.chunks.start,
        "chunk_length": run.chunks.length, "scale": run.settings.scale, "heads": run.H,
        "key_heads": run.HK, "value_heads": run.HV, "first_head": heads.base,
        "group_heads": heads.count,
    }  # fmt: skip
    arguments = hopper.fill(hopper.ScanArguments(), given)
    blocks = (run.chunks.num_segments * heads.count, 2 if kernel == "scan_states" else 1)
    for sum_only in (1, 0) if run.chunks.segmented else (0,):
        hopper.fill(arguments, {"sum_only": sum_only})
        hopper.run(kernel, run.t.q, run.V, False, blocks, arguments)
