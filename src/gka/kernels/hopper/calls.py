"""The Hopper kernels in the place of their Triton counterparts: arguments from a call's sizes and scratch."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gka.kernels import hopper
from gka.maths.ridge import empty_below

if TYPE_CHECKING:
    from gka.kernels.arrays import Adjoint, Ends, Heads, Maxima, Moments
    from gka.kernels.call import Launch


def solve_and_readout(
    run: "Launch", heads: "Heads", h: "Moments", u: "Moments", x: Tensor, x_scale: Tensor, o: Tensor
) -> None:
    """x_t and o_t of every token: `forward.cu`."""

    def given() -> dict:
        return _common(run, h, u) | {"o": o, "x": x, "x_scale": x_scale}

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

    def given() -> dict:
        return _common(run, h, u) | {
            "x": forward[0], "x_scale": forward[1], "d_o": do, "dq": grads[0], "d_alpha": grads[1],
            "y": out.y, "y_scale": out.y_scale, "w": out.w_t, "key_weight": out.key_weight,
            "start_weight": out.start_weight, "start_u": start_u, "start_h": out.start_h,
        }  # fmt: skip

    _run(run, heads, "adjoint", given)


def gradients(
    run: "Launch",
    heads: "Heads",
    h: "Moments",
    ends: tuple["Ends", "Ends"],
    maxima: "Maxima",
    forward: tuple[Tensor, Tensor],
    tokens: dict[str, Tensor],
    out: dict[str, Tensor | None],
) -> None:
    """dk, dv, d(beta^2) and both decays' gradients of every token: `gradients.cu`.

    Args:
        ends: of H and U, both alive.
        forward: x and x_scale as `solve_and_readout` left them.
        tokens: by the names of chunk.cuh, do and what `adjoint` left of every token.
        out: "dk", "dv", "dg", "dgk", "d_beta2", written; dk and dv of shared heads [B,T,G,D] float32.
    """

    def given() -> dict:
        t, (of_h, of_u) = run.t, ends
        read: dict = _places(run) | {
            "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": run.gk, "alpha": t.alpha, "beta": t.beta,
            "h_states": h.states, "h_scales": h.scales, "h_norms": h.norms,
            "scale": run.settings.scale, "x": forward[0], "x_scale": forward[1],
            "u_ends": of_u.states, "u_end_scales": of_u.scales, "u_wholes": of_u.wholes,
            "h_ends": of_h.states, "h_end_scales": of_h.scales, "h_wholes": of_h.wholes,
            "k_maxima": maxima.k, "v_maxima": maxima.v, "z_maxima": maxima.z, "d_maxima": maxima.d,
        }  # fmt: skip
        return read | tokens | out

    _run(run, heads, "gradients", given)


def _places(run: "Launch") -> dict:
    """Chunks and heads of a launch."""
    chunks = run.chunks
    return {
        "chunk_start": None if chunks.whole else chunks.start, "chunk_length": chunks.length,
        "heads": run.H, "key_heads": run.HK, "value_heads": run.HV, "first_chunk": 0,
    }  # fmt: skip


def _common(run: "Launch", h: "Moments", u: "Moments") -> dict:
    """What solve and adjoint read."""
    t, s = run.t, run.settings
    return _places(run) | {
        "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": run.gk, "alpha": t.alpha, "beta": t.beta,
        "h_states": h.states, "h_scales": h.scales, "h_norms": h.norms, "u_states": u.states,
        "u_scales": u.scales, "scale": s.scale, "ridge_ratio": s.ridge_ratio,
        "empty_below": empty_below(torch.float32), "num_iter": s.num_iter,
    }  # fmt: skip


def _run(run: "Launch", heads: "Heads", kernel: str, given: Callable[[], dict]) -> None:
    blocks = run.M * heads.count
    if blocks == 0:
        return
    arguments = _arguments(run, heads, kernel, hopper.Arguments, given)
    hopper.run(kernel, run.t.q, run.V, run.settings.solver == "adaptive", (blocks, 1), arguments)


def _arguments(
    run: "Launch", heads: "Heads", kernel: str, structure: type, given: Callable[[], dict]
):
    """A kernel's arguments: made for the first group of heads; the next differ in the heads alone."""
    held = run.arguments.get(kernel)
    if held is None:
        held = run.arguments[kernel] = hopper.fill(structure(), given())
    held.first_head, held.group_heads = heads.args
    return held


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
    """H and U at chunk starts, and final."""
    t = run.t

    def given() -> dict:
        sides = [
            _side(g, boundary, (s.states, s.scales, norms), s.final, parts)
            for g, s, norms, boundary, parts in zip(
                (run.gk, t.g), states, (states[0].norms, None), initial, sums, strict=True
            )
        ]
        largest = (None, None) if maxima is None else (maxima.k, maxima.v)
        return {
            "h": sides[0], "u": sides[1], "k": t.k, "v": t.v, "beta": t.beta,
            "first_maxima": largest[0], "second_maxima": largest[1],
        }  # fmt: skip

    _scan(run, heads, "states", given)


def scan_back(
    run: "Launch",
    heads: "Heads",
    states: tuple["Moments", "Moments"],
    ends: tuple["Ends", "Ends"],
    edges: tuple[tuple[Boundary, Tensor | None], tuple[Boundary, Tensor | None]],
    sums: tuple[Sums, Sums],
    forward: tuple[Tensor, Tensor],
    do: Tensor,
    of: "Adjoint",
    maxima: "Maxima",
) -> None:
    """The gradients E of H and U at chunk ends; that of H is not symmetrised.

    Args:
        ends: written; E of U may lie where U does.
        edges: of each state the final one's gradient, and the initial one's, which is written.
        forward: x and x_scale.
    """
    t = run.t

    def given() -> dict:
        sides = []
        for g, s, e, (boundary, initial), parts in zip(
            (run.gk, t.g), states, ends, edges, sums, strict=True
        ):
            out = (e.states, e.scales, None)
            side = _side(g, boundary, out, initial, parts)
            hopper.fill(side, {"stored": s.states, "stored_bounds": s.scales, "wholes": e.wholes})
            sides.append(side)
        return {
            "h": sides[0], "u": sides[1], "q": t.q, "k": t.k, "alpha": t.alpha, "beta": t.beta,
            "x": forward[0], "x_scale": forward[1], "d_o": do, "y": of.y, "y_scale": of.y_scale,
            "key_weight": of.key_weight, "start_weight": of.start_weight, "first_maxima": maxima.z,
            "second_maxima": maxima.d, "key_maxima": maxima.k,
        }  # fmt: skip

    _scan(run, heads, "back", given)


def _side(
    g: Tensor | None,
    boundary: Boundary,
    out: tuple[Tensor, Tensor, Tensor | None],
    last: Tensor | None,
    sums: Sums,
) -> hopper.Side:
    """`out`: the states, their bounds and norms."""
    values = (g, boundary[0], *out, last, sums[0], sums[2])
    names = ("g", "boundary", "states", "bounds", "norms", "last", "sums", "sum_decays")
    side = hopper.Side()
    hopper.fill(side, dict(zip(names, values, strict=True)))
    return side


def _scan(run: "Launch", heads: "Heads", direction: str, given: Callable[[], dict]) -> None:
    """Where a sequence has several segments first their sums, and what comes before each."""
    chunks = run.chunks

    def all_given() -> dict:
        return given() | {
            "segments": chunks.segments, "chunk_start": chunks.start, "chunk_length": chunks.length,
            "scale": run.settings.scale, "heads": run.H, "key_heads": run.HK, "value_heads": run.HV,
            "segment_count": chunks.num_segments,
        }  # fmt: skip

    arguments = _arguments(run, heads, direction, hopper.ScanArguments, all_given)
    blocks = (chunks.num_segments * heads.count, 2)

    def launch(kernel: str, blocks: tuple[int, int]) -> None:
        adaptive = run.settings.solver == "adaptive"
        hopper.run(f"{kernel}_{direction}", run.t.q, run.V, adaptive, blocks, arguments)

    if chunks.segmented:
        launch("sums", blocks)
        launch("combine", (run.K * max(run.K, run.V) // 512 * heads.count, 2))
    launch("scan", blocks)
