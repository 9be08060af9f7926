"""Inputs of the layer's map, and one way to run and differentiate any form of it on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.ops.chunk import chunk_gka
from gka.ops.reference import reference_gka

HeadCounts = tuple[int, int, int]
Decay = Literal["tied", "separate", "absent", "of U only", "of H only"]


@dataclass(frozen=True)
class Problem:
    """Arguments of `chunk_gka`. `tied`: g is passed as gk too."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    gk: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    h0: Tensor | None = None
    u0: Tensor | None = None
    cu_seqlens: Tensor | None = None
    tied: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """What can be differentiated, by name."""
        names = ("q", "k", "v", "g", "gk", "alpha", "beta", "h0", "u0")
        values = {name: getattr(self, name) for name in names}
        return {name: x for name, x in values.items() if x is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with every differentiable tensor changed."""
        return replace(self, **{name: change(x) for name, x in self.tensors().items()})

    def leaves(self) -> "Problem":
        return self.map(lambda x: x.detach().clone().requires_grad_())

    def tokens(self, begin: int | None, end: int | None) -> "Problem":
        """The same with the tokens begin .. end - 1 only."""
        per_token = ("q", "k", "v", "g", "gk", "alpha", "beta")
        parts = {n: x[:, begin:end] for n, x in self.tensors().items() if n in per_token}
        return replace(self, **parts)


Result = tuple[Tensor, Tensor, Tensor]
Form = Callable[..., Result]


def make_problem(
    length: int,
    heads: HeadCounts = (2, 2, 2),
    dims: tuple[int, int] = (16, 16),
    *,
    decay: Decay = "tied",
    gates: str = "ab",
    states: bool = True,
    batch: int = 1,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Random inputs as a layer would make them: unit queries and keys, gates in their ranges.

    `gates` names those given ("a" alpha, "b" beta); `lengths` packs sequences, `length` is then ignored.
    """
    torch.manual_seed(seed)
    cu_seqlens, sequences = None, batch
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        length, sequences = sum(lengths), len(lengths)
    h, hk, hv = heads
    key_dim, value_dim = dims
    q, k, v = (
        torch.randn(batch, length, n, d, dtype=torch.float64)
        for n, d in ((h, key_dim), (hk, key_dim), (hv, value_dim))
    )
    g, gk, alpha, beta = torch.rand(4, batch, length, h, dtype=torch.float64).unbind()
    root = torch.randn(sequences, h, key_dim, key_dim, dtype=torch.float64)
    u0 = torch.randn(sequences, h, key_dim, value_dim, dtype=torch.float64)
    problem = Problem(
        q=normalize(q, dim=-1),
        k=normalize(k, dim=-1),
        v=v,
        g=-0.2 * g if decay in ("tied", "separate", "of U only") else None,
        gk=-0.3 * gk if decay in ("separate", "of H only") else None,
        alpha=alpha if "a" in gates else None,
        beta=0.1 + 0.9 * beta if "b" in gates else None,
        h0=root @ root.mT / key_dim if states else None,
        u0=u0 if states else None,
        cu_seqlens=cu_seqlens,
        tied=decay == "tied",
    )
    return problem.map(lambda x: x.to(dtype))


def chunkwise(problem: Problem, op: Callable[..., Any] = chunk_gka, **settings: Any) -> Result:
    """o and both final states of `chunk_gka` (or an op with its signature); scale 1 unless told otherwise."""
    p = problem
    state = None if p.h0 is None else (p.h0, p.u0)
    settings = {"scale": 1.0, "beta": p.beta, **settings}
    o, final = op(
        p.q, p.k, p.v, p.g, p.g if p.tied else p.gk, p.alpha, initial_state=state,
        output_final_state=True, cu_seqlens=p.cu_seqlens, **settings,
    )  # fmt: skip
    assert final is not None
    return o, *final


def reference(problem: Problem, **settings: Any) -> Result:
    """The same by the token-by-token reference; `solver="exact"` makes it the oracle."""
    p = problem
    o, final = reference_gka(
        p.q, p.k, p.v, p.g, p.g if p.tied else p.gk, p.alpha, p.beta, (p.h0, p.u0), p.cu_seqlens,
        **settings,
    )  # fmt: skip
    return o, *final


def oracle(problem: Problem, **settings: Any) -> Result:
    """The exact map: Cholesky solves, token by token."""
    return reference(problem, solver="exact", **settings)


def upstream(results: Result, seed: int = 1) -> Result:
    """Random gradients of the results; that of H is not symmetric, as nobody need make it so."""
    generator = torch.Generator().manual_seed(seed)
    o, h, u = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results)
    return o, h, u


def differentiate(
    form: Form, problem: Problem, **settings: Any
) -> tuple[Result, dict[str, Tensor]]:
    """Results of a form of the map and the gradients of all its inputs, from o and both final states.

    H lives among the symmetric matrices, where a gradient is defined up to its antisymmetric part: that
    of h0 is symmetrised.
    """
    leaves = problem.leaves()
    results = form(leaves, **settings)
    loss = sum(
        (x.to(torch.promote_types(x.dtype, torch.float32)) * w.to(x.dtype)).sum()
        for x, w in zip(results, upstream(results), strict=True)
    )
    tensors = leaves.tensors()
    grads = torch.autograd.grad(torch.as_tensor(loss), list(tensors.values()))
    named = dict(zip(tensors, grads, strict=True))
    if "h0" in named:
        named["h0"] = (named["h0"] + named["h0"].mT) / 2
    o, h, u = (x.detach() for x in results)
    return (o, h, u), named


# what solvers that choose their steps are tried on, through every form of the ops
SOLVER_PROBLEMS = {
    "grouped, separate": make_problem(150, (4, 2, 1), (16, 8), decay="separate"),
    "tied, no states": make_problem(65, (2, 1, 2), (8, 16), states=False, gates=""),
    "packed": make_problem(0, (4, 1, 4), (8, 8), lengths=[0, 1, 63, 70]),
    "no decay, batch": make_problem(70, (2, 2, 2), (8, 8), decay="absent", batch=2),
    "of U only": make_problem(70, (3, 1, 1), (8, 8), decay="of U only"),
    "one token": make_problem(1, (2, 1, 2), (8, 8)),
}
