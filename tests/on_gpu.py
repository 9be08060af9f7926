"""One way to run the kernels, and the float64 torch form beside them, on the same rounded inputs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.ops import last_backend, why_unavailable
from problems import Problem, chunkwise, make_problem
from tolerances import assert_close

DEVICE, BACKEND = "cuda", "triton"
HEADS = ("q", "k", "v")
BACKENDS = ("triton", "hopper")
# every backend with every solver that it has
SETTINGS = [
    {"backend": backend, **solver}
    for backend in BACKENDS
    for solver in ({}, {"solver": "adaptive"}, {"solver": "cg"})
]


def on_device(problem: Problem, dtype: torch.dtype) -> Problem:
    """Heads rounded to `dtype`, gates and states to float32, on the GPU."""
    moved = {
        name: x.to(DEVICE, dtype if name in HEADS else torch.float32)
        for name, x in problem.tensors().items()
    }
    if problem.cu_seqlens is not None:
        moved["cu_seqlens"] = problem.cu_seqlens.to(DEVICE)
    return replace(problem, **moved)


def gpu_problem(length: int, dtype: torch.dtype, **options: Any) -> Problem:
    """`make_problem`, as the kernels get it."""
    return on_device(make_problem(length, **options), dtype)


def like_a_layer(length: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    """One sequence as a layer makes it: unit SiLU queries and keys with a common mean, slow tied decay."""
    torch.manual_seed(seed)
    shape = (1, length, heads, dim)
    q, k = (normalize(silu(torch.randn(shape) + 0.5), dim=-1).double() for _ in range(2))
    gates = torch.rand(2, 1, length, heads, dtype=torch.float64)
    problem = Problem(
        q=q,
        k=k,
        v=torch.randn(shape, dtype=torch.float64),
        g=-(10.0 ** (-3 + 2 * gates[0])),
        alpha=gates[1],
        tied=True,
    )
    return on_device(problem, dtype)


def leaning(problem: Problem) -> Problem:
    """The same with keys that lean one way and decays ten times slower: fewer steps prove the bound."""
    common = normalize(torch.ones_like(problem.k), dim=-1)
    slow = {n: 0.1 * x for n, x in problem.tensors().items() if n in ("g", "gk")}
    keys = normalize(problem.k.float() + 1.5 * common.float(), dim=-1).to(problem.k.dtype)
    return replace(problem, k=keys, **slow)


def upstream(problem: Problem, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, H and U in the dtypes that the kernels give those."""
    p, generator = problem, torch.Generator().manual_seed(seed)
    batch, length, heads, key_dim = p.q.shape
    sequences = batch if p.cu_seqlens is None else len(p.cu_seqlens) - 1
    value_dim = p.v.shape[-1]
    shapes = (
        (batch, length, heads, value_dim),
        (sequences, heads, key_dim, key_dim),
        (sequences, heads, key_dim, value_dim),
    )
    o, h, u = (torch.randn(shape, generator=generator).to(p.q.device) for shape in shapes)
    return o.to(p.q.dtype), h, u


def skip_unless_available(problem: Problem, backend: str) -> None:
    """Skips the test where the backend cannot run such inputs on this machine, with its reason."""
    dims = (problem.q.shape[-1], problem.v.shape[-1])
    reason = why_unavailable(backend, problem.q.device, problem.q.dtype, dims=dims)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def run(problem: Problem, weights: tuple[Tensor, ...] | None = None, **settings: Any) -> dict:
    """o, h, u and the gradient d<name> of every input, by the kernels unless told otherwise.

    `weights` are the gradients of o, h and u. The gradient of h0 is symmetrised, as H is.
    """
    settings = {"backend": BACKEND, **settings}
    skip_unless_available(problem, settings["backend"])
    leaves = problem.leaves()
    outputs = chunkwise(leaves, **settings)
    assert last_backend() == settings["backend"]
    tensors = leaves.tensors()
    weights = upstream(problem) if weights is None else weights
    weights = tuple(w.to(x) for w, x in zip(weights, outputs, strict=True))
    grads = torch.autograd.grad(outputs, list(tensors.values()), weights)
    named = {f"d{name}": x for name, x in zip(tensors, grads, strict=True)}
    if "dh0" in named:
        named["dh0"] = (named["dh0"] + named["dh0"].mT) / 2
    o, h, u = (x.detach() for x in outputs)
    return {"o": o, "h": h, "u": u, **named}


def float64(problem: Problem, **settings: Any) -> dict:
    """The same by the torch form in float64, from the same rounded inputs and upstream gradients."""
    return run(problem.map(lambda x: x.double()), upstream(problem), **settings, backend="torch")


def assert_all_close(actual: dict, expected: dict, tolerance: float, what: str = "") -> None:
    """Every result within a relative 2-norm tolerance."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, f"{what} {name}")


def assert_same_bits(actual: dict, expected: dict, what: str = "") -> None:
    """Every result equal, bit for bit, and free of NaN."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert not bool(value.isnan().any()), f"{what} {name} holds NaN"
        assert torch.equal(actual[name], value), f"{what} {name} differs"
