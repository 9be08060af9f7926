"""Of `sketching`: the sketched op against its definition in float64, and its time beside the plain op's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.benchmark import Timer

from gka.errors import InputError
from gka.experiments.reproduce.experiment import finite
from gka.maths.sketch import orthonormal, sketched_sequence
from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.models.flops import mixer_flops
from gka.ops import chunk_gka, fused_recurrent_gka_
from gka.ops.backends import Call, resolve_backend
from gka.ops.sketch import chunk_sketched_gka, fused_recurrent_sketched_gka_

Args = tuple[Tensor, ...]
STEPS, RATIO = 30, 0.02
TRUNCATION = 4 * ((1 + RATIO) / RATIO) ** 0.5 * chebyshev_bound(RATIO, STEPS)
"""Of gradients after so many steps, against those of the exact solve."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Relative error of o and of gradients against float64 on the same inputs; tests/tolerances.py."""


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads of K = V = dim; times are medians over at least `seconds` each."""

    batch: int
    length: int
    heads: int
    dim: int
    seconds: float


def inputs(shape: Shape, sketch: int, device: str, length: int) -> tuple[Args, Args, Tensor]:
    """(q, k, v), (g, alpha, beta) and S, in the dtype that the device computes in."""
    generator = torch.Generator().manual_seed(sketch)
    size = (shape.batch, length, shape.heads)
    q, k, v = torch.randn(3, *size, shape.dim, generator=generator)
    g, alpha, beta = torch.rand(3, *size, generator=generator).unbind()
    basis = orthonormal(torch.randn(shape.heads, shape.dim, sketch, generator=generator))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    heads = tuple(x.to(device, dtype) for x in (normalize(q, dim=-1), normalize(k, dim=-1), v))
    gates = tuple(x.to(device) for x in (-0.05 * g, alpha, 0.5 + 0.5 * beta))
    return heads, gates, basis.to(device, dtype)


def _op(heads: Args, gates: Args, basis: Tensor | None, mixed: bool = True) -> Tensor:
    (q, k, v), (g, alpha, beta) = heads, gates
    options: dict[str, Any] = {"num_iter": STEPS, "ridge_ratio": RATIO, "beta": beta}
    gate = alpha if mixed else None
    if basis is None:
        return chunk_gka(q, k, v, g, g, gate, **options)[0]
    return chunk_sketched_gka(q, k, v, basis, g, g, gate, **options)[0]


def _true(heads: Args, gates: Args, basis: Tensor, mixed: bool) -> Tensor:
    """o by the definition."""
    (q, k, v), (g, alpha, beta) = heads, gates
    zeros = (q.new_zeros(len(q), *q.shape[2:], x.shape[-1]) for x in (k, v))
    return sketched_sequence(
        q, k, v, basis, g, g, alpha if mixed else None, beta, (next(zeros), next(zeros)),
        scale=q.shape[-1] ** -0.5, ridge_ratio=RATIO, num_iter=STEPS, solver="exact",
    )[0]  # fmt: skip


def errors(shape: Shape, sketch: int, device: str, length: int, mixed: bool) -> dict[str, float]:
    """Relative errors of o and of all gradients on a short sequence, against autograd through the definition.

    Raises:
        InputError: one is above the tolerance of the dtype and `TRUNCATION`.
    """
    given = inputs(shape, sketch, device, length)
    names = ("q", "k", "v", "g", "alpha", "beta", "sketch")

    def run(op: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [change(x).detach().requires_grad_() for x in (*given[0], *given[1], given[2])]
        o = op(tuple(leaves[:3]), tuple(leaves[3:6]), leaves[6], mixed)
        weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).sin().view(o.shape)
        used = [x for x, name in zip(leaves, names, strict=True) if mixed or name != "alpha"]
        return o, *torch.autograd.grad((o.double() * weight.to(o.device)).sum(), used)

    ours = run(_op, lambda x: x)
    true = run(_true, lambda x: x.double().cpu())
    kept = ["o", *(name for name in names if mixed or name != "alpha")]
    found = {
        name: float((x.detach().double().cpu() - y.detach()).norm() / y.detach().norm())
        for name, x, y in zip(kept, ours, true, strict=True)
    }
    limit = TOLERANCE[ours[0].dtype] + TRUNCATION
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= limit:
        raise InputError(f"{worst} is off by {found[worst]:.2e}; expected at most {limit:.1e}")
    return found


def _time(function: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Median and interquartile range of a call, in seconds."""
    function()
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=seconds)
    return found.median, found.iqr


def _both_ways(heads: Args, gates: Args, basis: Tensor | None, mixed: bool) -> Callable[[], Any]:
    leaves = [x.detach().clone().requires_grad_() for x in (*heads, *gates)]
    map_ = None if basis is None else basis.detach().clone().requires_grad_()
    used = [x for i, x in enumerate(leaves) if mixed or i != 4] + ([] if map_ is None else [map_])
    grad = torch.randn_like(heads[2])

    def run() -> None:
        o = _op(tuple(leaves[:3]), tuple(leaves[3:]), map_, mixed)
        torch.autograd.grad(o, used, grad)

    return run


@torch.no_grad()
def _forward(heads: Args, gates: Args, basis: Tensor | None, mixed: bool) -> Any:
    return _op(heads, gates, basis, mixed)


def _decoding(shape: Shape, basis: Tensor | None, device: str, mixed: bool) -> Callable[[], Any]:
    """One token of every sequence, states in place."""
    (q, k, v), (g, alpha, beta), _ = inputs(shape, 1, device, 1)
    batch, heads, dim = shape.batch, shape.heads, shape.dim
    inner = dim if basis is None else basis.shape[-1]
    sizes = [(inner, inner), (inner, dim)] + ([] if basis is None or not mixed else [(dim, dim)])
    states: Any = tuple(torch.zeros(batch, heads, *size, device=device) for size in sizes)
    gate, options = alpha if mixed else None, {"state": states, "beta": beta}

    @torch.no_grad()
    def run() -> None:
        if basis is None:
            fused_recurrent_gka_(q, k, v, g, g, gate, **options)
        else:
            fused_recurrent_sketched_gka_(q, k, v, basis, g, g, gate, **options)

    return run


def _learned(basis: Tensor) -> Callable[[], Any]:
    """S from its weight in float32, and the weight's gradient: what a learned map adds to a call."""
    weight = basis.detach().float().requires_grad_()
    grad = torch.randn_like(weight)
    return lambda: torch.autograd.grad(orthonormal(weight), weight, grad)


def state_bytes(dim: int, sketch: int | None, mixed: bool) -> int:
    """float32 bytes of a head's states."""
    if sketch is None:
        return 4 * 2 * dim**2
    return 4 * (sketch**2 + sketch * dim + (dim**2 if mixed else 0))


def measure(shape: Shape, sketch: int | None, device: str, mixed: bool) -> dict[str, Any]:
    """Errors and times of one d; None: of the plain op, which has times alone."""
    heads, gates, basis = inputs(shape, sketch or 1, device, shape.length)
    here = None if sketch is None else basis
    found: dict[str, Any] = {"of": "speed", "sketch": sketch, "mixed": mixed, "device": device}
    if sketch is not None:
        # as many heads: Triton compiles for their number
        small = Shape(1, 0, shape.heads, shape.dim, 0.0)
        short = errors(small, sketch, device, min(70, shape.length), mixed)
        found["errors"] = {name: finite(x, 3) for name, x in short.items()}
    call = Call(heads[0].device, heads[0].dtype, "chebyshev", (sketch or shape.dim, shape.dim))
    timed = {
        "forward": lambda: _forward(heads, gates, here, mixed),
        "both ways": _both_ways(heads, gates, here, mixed),
        "decode": _decoding(shape, here, device, mixed),
    }
    if sketch is not None:
        timed["learned map"] = _learned(basis)
    times = {name: _time(run, shape.seconds) for name, run in timed.items()}
    return found | {
        "backend": resolve_backend("auto", call),
        "times": {name: [finite(x) for x in pair] for name, pair in times.items()},
        "flops": mixer_flops("gka", shape.dim, shape.length, STEPS, None, sketch, mixed),
        "state bytes": state_bytes(shape.dim, sketch, mixed),
        "shape": [shape.batch, shape.length, shape.heads, shape.dim],
    }
