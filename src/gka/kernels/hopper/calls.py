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
        ends: of U and H, both alive.
        forward: x and x_scale as `solve_and_readout` left them.
        tokens: by the names of chunk.cuh, do and what `adjoint` left of every token.
        out: "dk", "dv", "dg", "dgk", "d_beta2", written; dk and dv of shared heads [B,T,G,D] float32.
    """
    t, (of_u, of_h) = run.t, ends
    given: dict = _places(run, heads) | {
        "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": run.gk, "alpha": t.alpha, "beta": t.beta,
        "h_states": h.states, "h_scales": h.scales, "h_norms": h.norms, "scale": run.settings.scale,
        "x": forward[0], "x_scale": forward[1], "u_ends": of_u.states, "u_end_scales": of_u.scales,
        "u_wholes": of_u.wholes, "h_ends": of_h.states, "h_end_scales": of_h.scales,
        "h_wholes": of_h.wholes, "k_maxima": maxima.k, "v_maxima": maxima.v, "z_maxima": maxima.z,
        "d_maxima": maxima.d,
    }  # fmt: skip
    _run(run, heads, "gradients", given | tokens | out)


def _places(run: "Launch", heads: "Heads") -> dict:
    """Chunks and heads of a launch."""
    return {
        "chunk_start": run.chunks.start, "chunk_length": run.chunks.length, "heads": run.H,
        "key_heads": run.HK, "value_heads": run.HV, "first_head": heads.base,
        "group_heads": heads.count, "first_chunk": 0, "h_blocks": run.NK,
    }  # fmt: skip


def _common(run: "Launch", heads: "Heads", h: "Moments", u: "Moments") -> dict:
    """What both kernels read; with the adaptive solver also what certify.cu finds of the states."""
    t, s = run.t, run.settings
    given = _places(run, heads) | {
        "q": t.q, "k": t.k, "v": t.v, "g": t.g, "gk": run.gk, "alpha": t.alpha, "beta": t.beta,
        "h_states": h.states, "h_scales": h.scales, "h_norms": h.norms, "u_states": u.states,
        "u_scales": u.scales, "scale": s.scale, "ridge_ratio": s.ridge_ratio,
        "empty_below": empty_below(torch.float32), "num_iter": s.num_iter,
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
    arguments = hopper.arguments(**(given | waiting))
    adaptive = run.settings.solver == "adaptive" and kernel != "gradients"  # which has no solve
    hopper.run(kernel, run.t.q, run.V, adaptive, blocks, arguments)
