"""Wrong calls: a good one with one argument made wrong. Each must be refused by name, in one line."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.ops import (
    advance_states_,
    chunk_gka,
    chunk_simple_gla,
    combine_states,
    fused_recurrent_gka,
    fused_recurrent_gka_,
    mean_states,
    solver_steps,
    sum_states,
)
from gka.ops.convolution import convolve_heads
from gka.ops.delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gka.ops.surround import gated_rms_norm, layer_gates

B, T, H, HK, HV, K, V = 2, 6, 4, 2, 1, 8, 5
NAN, INF = float("nan"), float("inf")
Wrong = tuple[str, Any]  # the argument, and what to give instead


@dataclass
class Refusal:
    """What a wrong call came to: "refused", "silent" (it ran), "obscure" (another error), or "unnamed"."""

    status: str
    what: str
    message: str = ""


def attempt(what: str, argument: str, run: Callable[[], Any]) -> Refusal:
    """Run a wrong call and judge its error."""
    try:
        run()
    except (InputError, ValueError, TypeError) as error:
        text = str(error)
    except Exception as error:
        return Refusal("obscure", what, f"{type(error).__name__}: {str(error)[:300]}")
    else:
        return Refusal("silent", what)
    named = re.search(rf"\b{re.escape(argument)}\b", text)
    if "\n" in text or len(text) > 400:
        return Refusal("obscure", what, text[:300])
    return Refusal("refused" if named else "unnamed", what, text)


# -- what can be wrong with a value ---------------------------------------------------------------------


def of_another_kind(x: Tensor) -> list[Any]:
    """Things that are no dense floating-point tensor on the CPU."""
    return [
        [1.0, 2.0], "text", 3, x.numpy(), x.long(), x.bool(), x.to(torch.complex64), x.to("meta"),
        x.to_sparse(), x.to_mkldnn(), torch.nested.nested_tensor([x[0], x[0]]),
        torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ]  # fmt: skip


def of_another_shape(x: Tensor) -> list[Tensor]:
    """The tensor with a dimension too many, too few, or of another length."""
    longer = [torch.cat([x, x.narrow(d, 0, 1)], d) for d in range(x.dim())]
    shorter = [x.narrow(d, 0, x.shape[d] - 1) for d in range(x.dim()) if x.shape[d] > 1]
    return [x.unsqueeze(0), x.unsqueeze(-1), x[0], x.flatten(), x.sum(), *longer, *shorter]


def wrong_tensor(name: str, x: Tensor, optional: bool = False) -> list[Wrong]:
    missing = [] if optional else [None]
    return [(name, bad) for bad in (*missing, *of_another_kind(x), *of_another_shape(x))]


FLAGS = ["yes", 1, 0, None, 1.0]
NUMBERS: dict[str, list[Any]] = {
    "num_iter": [-1, 2.5, True, "3", None, 10**9],
    "ridge_ratio": [0.0, -1.0, NAN, INF, "a", None, 1e300, 1e-300, True],
    "chunk_size": [0, -5, 1.5, None, "64", True, 10**12],
    "scale": [NAN, INF, "a", 1e300, True, [1.0]],
    "solver": ["magic", None, 3, ""],
    "backend": ["cuda", None, 7, ""],
}


def bounds(*values: float) -> Tensor:
    return torch.tensor(values)


WRONG_BOUNDS = [
    [0, T], "text", bounds(0), bounds(1, T), bounds(0, T - 1), bounds(0, 4, 3, T), bounds(0, T + 3),
    bounds(0.0, float(T)), bounds(0, T)[None], bounds(0, T).to("meta"), bounds(0, T).bool(),
    bounds(0, T).to_sparse(), bounds(-1, T),
]  # fmt: skip


def inputs() -> dict[str, Tensor]:
    q, k, v = (torch.randn(B, T, n, d) for n, d in ((H, K), (HK, K), (HV, V)))
    gates = {name: torch.rand(B, T, H) for name in ("alpha", "beta")}
    return {"q": q, "k": k, "v": v, "g": -torch.rand(B, T, H), "gk": -torch.rand(B, T, H), **gates}


def states(batch: int = B) -> tuple[Tensor, Tensor]:
    return torch.eye(K).expand(batch, H, K, K).contiguous(), torch.randn(batch, H, K, V)


def without_heads(name: str, x: Tensor) -> list[Wrong]:
    """Shapes of q, k and v that are right for a call of other heads: three of them, or one."""
    return [
        w for w in wrong_tensor(name, x) if not (isinstance(w[1], Tensor) and _may_run(name, w[1]))
    ]


def _may_run(name: str, x: Tensor) -> bool:
    dims = {"q": (K,), "k": (K,), "v": range(1, 257)}[name]
    plain = x.layout == torch.strided and not x.is_nested and x.dtype == torch.float32
    if not plain or x.dim() != 4 or x.device.type != "cpu" or x.is_mkldnn:
        return False
    fits = x.shape[2] > 0 and H % x.shape[2] == 0
    return x.shape[:2] == (B, T) and fits and x.shape[3] in dims


# -- the calls -----------------------------------------------------------------------------------------

Case = tuple[str, str, Callable[[], Any]]


def bind(op: Callable, good: dict[str, Any], wrong: list[Wrong], name: str = "") -> list[Case]:
    """(what, the argument's name, the call) of each wrong argument."""
    label = name or op.__name__
    return [
        (f"{label}({key}={describe(bad)})", key, lambda key=key, bad=bad: op(**{**good, key: bad}))
        for key, bad in wrong
    ]


def describe(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {x!r:.40}"
    if x.is_nested:
        return "nested tensor"
    return f"{x.dtype} {x.layout} {x.device.type} {list(x.shape)}".replace("torch.", "")


def options(*names: str) -> list[Wrong]:
    return [(name, bad) for name in names for bad in NUMBERS[name]]


def _packed(good: dict[str, Any]) -> dict[str, Any]:
    return {k: x[:1] if isinstance(x, Tensor) else x for k, x in good.items()}


def _sequence_op(op: Callable, gates: tuple[str, ...], numbers: tuple[str, ...]) -> list[Case]:
    every = inputs()
    good: dict[str, Any] = {name: every[name] for name in ("q", "k", "v", *gates)}
    wrong = [w for name in "qkv" for w in without_heads(name, every[name])]
    wrong += [w for name in gates for w in wrong_tensor(name, every[name], optional=True)]
    wrong += [*options(*numbers), *(("output_final_state", flag) for flag in FLAGS)]
    wrong += [
        ("v", torch.zeros(B, T, HV, 257)),
        ("v", torch.zeros(B, T, HV, 0)),
        ("v", every["v"].double()),
    ]
    wrong += [("k", torch.zeros(B, T, 3, K)), ("k", torch.zeros(B, T, 0, K)), ("num_iters", 3)]
    cases = bind(op, good, wrong)
    cases += bind(op, _packed(good), [("cu_seqlens", bad) for bad in WRONG_BOUNDS])
    cases += bind(op, good, [("cu_seqlens", bounds(0, T)), ("cu_seqlens_cpu", bounds(0, T))])
    whole = {**_packed(good), "cu_seqlens": bounds(0, T)}
    copies = [bad for bad in WRONG_BOUNDS if isinstance(bad, Tensor) and bad.shape == (2,)]
    copies = [
        x
        for x in copies
        if not (x.dtype == torch.int64 and x.device.type == "cpu" and not x.is_sparse)
    ]
    return cases + bind(
        op, whole, [("cu_seqlens_cpu", bad) for bad in (*copies, [0, T], bounds(0, 3, T))]
    )


def _initial_states(op: Callable, paired: bool) -> list[Case]:
    good, (h, u) = inputs(), states()
    names = "qkv" if not paired else ("q", "k", "v", "g", "gk", "alpha", "beta")
    good = {name: good[name] for name in names}
    if not paired:
        bad: list[Any] = [x for _, x in wrong_tensor("", u, optional=True)] + [u.double(), (h, u)]
        return bind(op, good, [("initial_state", x) for x in bad])
    bad = [
        h,
        (h,),
        (h, u, u),
        (None, u),
        (h, None),
        (u, h),
        (h.double(), u),
        (h, u.half()),
        "text",
        3,
    ]
    bad += [(x, u) for _, x in wrong_tensor("", h)] + [(h, x) for _, x in wrong_tensor("", u)]
    return bind(op, good, [("initial_state", x) for x in bad])


def _in_place() -> list[Case]:
    every, (h, u) = inputs(), states()
    step: dict[str, Any] = {
        name: every[name] for name in ("q", "k", "v", "g", "gk", "alpha", "beta")
    }
    step["state"] = (h, u)
    places = [
        [0, 1],
        bounds(0, 0),
        bounds(0, 7),
        bounds(-2, 0),
        bounds(0.0, 1.0),
        bounds(0),
        bounds(0, 1)[None],
    ]
    bad_states = [
        None,
        h,
        (h,),
        (h, u, u),
        (u, u),
        (h, h),
        (h.double(), u),
        (h, u.half()),
        (None, u),
        (h, None),
    ]
    bad_states += [
        (h.mT, u),
        (h[:1].expand_as(h), u),
        (h.clone().requires_grad_(), u),
        (h[:1], u[:1]),
    ]
    bad_states += [(x, u) for x in of_another_kind(h)] + [(h, x) for x in of_another_kind(u)]
    shared = [("state_indices", x) for x in places] + [("state", x) for x in bad_states]
    wrong = [*options("num_iter", "ridge_ratio", "scale", "solver", "backend"), *shared]
    wrong += [("commit", flag) for flag in FLAGS] + [
        w for n in "qkv" for w in without_heads(n, every[n])
    ]
    wrong += [
        w for n in ("g", "gk", "alpha", "beta") for w in wrong_tensor(n, every[n], optional=True)
    ]
    advance = {name: step[name] for name in ("k", "v", "g", "gk", "beta", "state")}
    advance["counts"] = bounds(1, 2)
    counts = [
        None,
        [1, 2],
        bounds(1.0, 2.0),
        bounds(1),
        bounds(1, 2)[None],
        bounds(1, 2).to("meta"),
        3,
    ]
    bad = [*(("counts", x) for x in counts), *options("backend"), *shared]
    bad += [w for n in ("g", "gk", "beta") for w in wrong_tensor(n, every[n], optional=True)]
    return bind(fused_recurrent_gka_, step, wrong) + bind(advance_states_, advance, bad)


def _states() -> list[Case]:
    a, b, g = states(), states(), -torch.rand(B, H)
    pairs = [
        None,
        a[0],
        (a[0],),
        "text",
        (a[0], None),
        (a[0].long(), a[1].long()),
        (a[0][:1], a[1][:1]),
    ]
    pairs += [tuple(x.double() for x in a), (a[1], a[0])]
    combine = [("b", x) for x in pairs]
    cases = [
        (f"combine_states(b={describe(x)})", "state", lambda x=x: combine_states(a, x, g))
        for _, x in combine
    ]
    totals = [*of_another_kind(g), g[0], g[:, :1], 3.0]
    cases += bind(
        combine_states,
        {"a": a, "b": b, "g": g, "gk": g},
        [(n, x) for n in ("g", "gk") for x in totals],
    )
    for op in (sum_states, mean_states):
        every = [None, [], 3, a[0], [a[0]], [a, b[:1]], [a, (b[0], b[1].double())], iter([a])]
        cases += [
            (f"{op.__name__}({describe(x)})", "state" if isinstance(x, list) and x else "states",
             lambda op=op, x=x: op(x)) for x in every
        ]  # fmt: skip
    k, h = torch.randn(B, T, H, K), a[0]
    good = {"k": k, "gk": -torch.rand(B, T, H), "initial_state": h}
    wrong = [
        *options("num_iter", "ridge_ratio", "chunk_size"),
        *(("num_heads", x) for x in ("x", 3, 0, -4, 2.0, True)),
    ]
    wrong += [
        *wrong_tensor("gk", good["gk"], optional=True),
        *wrong_tensor("initial_state", h, optional=True),
    ]
    return cases + bind(solver_steps, good, wrong)


def _around() -> list[Case]:
    """What surrounds the op: kernels trust these shapes."""
    x, w, c = torch.randn(B, T, 16), torch.randn(16, 1, 4), torch.randn(B, 16, 4)
    cases = []
    for name, bad in (
        ("q", (x[0], x, x)), ("k", (x, x[:1], x)), ("v", (x, x, x[:, :3])), ("q", (None, x, x)),
        ("v", (x, x, None)), ("q", (x[..., :15], x, x)),
    ):  # fmt: skip
        given: Any = bad
        run = lambda bad=given: convolve_heads(bad, (w, w, w), 8)  # noqa: E731
        cases.append((f"convolve_heads({name})", name, run))
    for bad in ((w[:, :, :2], w, w), (w, w[:3], w), (w, w, w.squeeze(1))):
        run = lambda bad=bad: convolve_heads((x, x, x), bad, 8)  # noqa: E731
        cases.append(("convolve_heads(weights)", "weight", run))
    run = lambda: convolve_heads((x, x, x), (w, w, w), 8, (c[..., :3], c, c))  # noqa: E731
    cases.append(("convolve_heads(states)", "state", run))
    cases.append(
        ("gated_rms_norm(weight)", "weight", lambda: gated_rms_norm(x, None, w[0, 0], 1e-6))
    )
    cases.append(
        ("gated_rms_norm(gate)", "gate", lambda: gated_rms_norm(x, x[:1], torch.ones(16), 1e-6))
    )
    a = torch.randn(B, T, H)
    cases.append(("layer_gates(a)", "A_log", lambda: layer_gates(a=a)))
    cases.append(("layer_gates(alpha)", "alpha", lambda: layer_gates(b=a, alpha=a[:1])))
    cases.append(("layer_gates(b)", "gates", lambda: layer_gates(b=a[0])))
    return cases


def wrong_ops() -> list[Case]:
    """Every wrong call of an op."""
    gka, gla = ("g", "gk", "alpha", "beta"), ("g", "beta")
    every = ("num_iter", "ridge_ratio", "scale", "solver", "backend")
    cases = _sequence_op(chunk_gka, gka, (*every, "chunk_size")) + _initial_states(chunk_gka, True)
    cases += _sequence_op(fused_recurrent_gka, gka, every) + _initial_states(
        fused_recurrent_gka, True
    )
    cases += _sequence_op(chunk_simple_gla, gla, ("scale", "backend", "chunk_size"))
    cases += _initial_states(chunk_simple_gla, False)
    for op in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
        cases += _sequence_op(op, gla, ("scale",)) + _initial_states(op, False)
    return cases + _in_place() + _states() + _around()
