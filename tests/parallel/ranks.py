"""Run a function on several gloo processes, and the cases of context parallelism that they run."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gka.errors import InputError
from gka.maths.sketch import orthonormal
from gka.ops import chunk_gka, chunk_simple_gla
from gka.ops.delta_rule import chunk_gated_delta_rule
from gka.ops.sketch import chunk_sketched_gka
from gka.parallel import ContextParallel
from problems import make_problem, upstream
from tolerances import relative_error

RANKS = 4
RANGES = [(0, 64), (64, 256), (256, 320), (320, 440)]
LENGTH = 440
# one over three ranks, one that ends at a rank's end, one of one token, one that begins at its rank's begin
DOCUMENTS = [0, 50, 256, 257, 320, 440]
OVER_THREE = [0, 10, 330, 440]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _start(rank: int, ranks: int, port: int, run: Callable, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        torch.save(run(), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_ranks(run: Callable[[], Any], folder: Path, ranks: int = RANKS) -> list[Any]:
    """What `run` returns on each of the ranks."""
    # forked processes need not import torch again; CUDA does not survive a fork
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    args = (ranks, free_port(), run, str(folder))
    mp.start_processes(_start, args, nprocs=ranks, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


class Counting(ContextParallel):
    """A context that counts the bytes that a rank contributes: gathered, reduced, exchanged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gathered: list[int] = []
        self.reduced: list[int] = []
        self.sent: list[list[int]] = []

    def gather(self, x: Tensor) -> Tensor:
        self.gathered.append(x.nbytes)
        return super().gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.reduced.append(x[0].nbytes)
        return super().reduce_scatter(x)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        self.sent.append([n * x.element_size() for n in sent])
        return super().exchange(x, sent, received)


def context_of(case: dict[str, Any]) -> Counting:
    documents = case.get("documents")
    bounds = None if documents is None else torch.tensor(documents)
    return Counting(None, RANGES, bounds)


# name: arguments of make_problem and of the op, packed documents, whether their first one alone has a state
OP_CASES: dict[str, dict[str, Any]] = {
    "tied, batch": {"problem": {"decay": "tied", "batch": 2}},
    "separate, grouped": {"problem": {"decay": "separate", "heads": (4, 2, 1)}},
    "no decay, no gates": {"problem": {"decay": "absent", "gates": "", "states": False}},
    "of U only": {"problem": {"decay": "of U only"}},
    "packed": {"problem": {"decay": "tied", "heads": (4, 1, 2)}, "documents": DOCUMENTS},
    "over three ranks": {
        "problem": {"decay": "separate", "states": False}, "documents": OVER_THREE,
    },
    "first state": {"problem": {"decay": "tied"}, "documents": OVER_THREE, "first": True},
    "adaptive": {"problem": {"decay": "tied"}, "op": {"solver": "adaptive"}},
    "cg": {"problem": {"decay": "separate"}, "op": {"solver": "cg"}},
    "no ridge": {"problem": {"decay": "separate"}, "op": {"num_iter": 0}},
    "gla": {"problem": {"decay": "tied"}, "kind": "gla", "documents": DOCUMENTS},
    "gated delta rule": {"problem": {"decay": "tied", "batch": 2}, "kind": "delta"},
    "delta rule": {
        "problem": {"decay": "absent", "heads": (4, 2, 4)}, "kind": "delta", "documents": OVER_THREE,
    },
}  # fmt: skip


def problem_of(case: dict[str, Any], dtype: torch.dtype) -> Any:
    documents = case.get("documents")
    lengths = None if documents is None else torch.tensor(documents).diff().tolist()
    p = make_problem(
        LENGTH, dims=(8, 12), lengths=lengths, **{"heads": (2, 2, 2)} | case["problem"]
    )
    if case.get("first"):
        p = p.map(lambda x: x[:1] if len(x) > 1 else x)
    return p.map(lambda x: x.to(dtype))


def call(case: dict[str, Any], p: Any, **options: Any) -> tuple[Tensor, ...]:
    """o and the final states of a case's op."""
    options = {"scale": 1.0, "output_final_state": True, **case.get("op", {}), **options}
    state = None if p.h0 is None else (p.h0, p.u0)
    if case.get("kind") == "gla":
        o, u = chunk_simple_gla(p.q, p.k, p.v, p.g, initial_state=p.u0, beta=p.beta, **options)
        return o, u  # pyright: ignore[reportReturnType]
    if case.get("kind") == "delta":
        o, u = chunk_gated_delta_rule(p.q, p.k, p.v, p.g, p.beta, initial_state=p.u0, **options)
        return o, u  # pyright: ignore[reportReturnType]
    o, final = chunk_gka(
        p.q, p.k, p.v, p.g, p.g if p.tied else p.gk, p.alpha, beta=p.beta, initial_state=state,
        **options,
    )  # fmt: skip
    assert final is not None
    return o, *final


def gradients(p: Any, results: tuple[Tensor, ...], weights: list[Tensor]) -> dict[str, Tensor]:
    total = torch.as_tensor(
        sum((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True))
    )
    tensors = p.tensors()
    grads = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(tensors.items(), grads, strict=True)
    }


def upstream_of(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Random gradients; that of H is symmetric, because ranks add halves of it up."""
    o, u = results[0], results[-1]
    h = u.new_empty(*u.shape[:3], u.shape[2])
    found = list(upstream((o, h, u)))
    found[1] = (found[1] + found[1].mT) / 2
    return found if len(results) == 3 else [found[0], found[2]]


def whole(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A case on one process."""
    case = OP_CASES[name]
    p = problem_of(case, dtype).leaves()
    results = call(case, p, cu_seqlens=p.cu_seqlens)
    grads = gradients(p, results, upstream_of(results))
    return {"results": [x.detach() for x in results], "grads": grads}


def split(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A case on this rank."""
    case = OP_CASES[name]
    p: Any = problem_of(case, dtype)
    context = context_of(case)
    shapes = (
        (*p.q.shape[:3], p.v.shape[-1]),
        *(
            (len(p.q) if p.cu_seqlens is None else len(p.cu_seqlens) - 1, p.q.shape[2], 8, width)
            for width in (8, 12)
        ),
    )
    weights = list(upstream(tuple(torch.empty(s) for s in shapes)))  # pyright: ignore[reportArgumentType]
    weights[1] = (weights[1] + weights[1].mT) / 2
    mine = [context.shard(weights[0])]
    numbers = list(context.documents) or list(range(len(p.q)))
    bounds: Any = p.cu_seqlens
    ends = [
        bounds[n + 1] <= context.end if context.documents else context.rank == RANKS - 1
        for n in numbers
    ]
    p = p.tokens(context.begin, context.end).leaves()
    results = call(case, p, context=context)
    finals = weights[1:] if len(results) == 3 else weights[2:]
    mine += [w[numbers] * torch.tensor(ends)[:, None, None, None] for w in finals]
    grads = gradients(p, results, mine)
    return {
        "results": [x.detach() for x in results], "grads": grads, "numbers": numbers, "ends": ends,
        "gathered": context.gathered, "reduced": context.reduced,
    }  # fmt: skip


def all_ops() -> dict[Any, Any]:
    """Every case in float64, and some in float32."""
    found: dict[Any, Any] = {(name, torch.float64): split(name, torch.float64) for name in OP_CASES}
    for name in ("separate, grouped", "packed", "cg"):
        found[name, torch.float32] = split(name, torch.float32)
    return found | {"errors": errors(), "sketched": sketched()}


def sketched() -> dict[str, float]:
    """Errors of this rank's part of a sketched call with alpha, against whole rows: o and every gradient."""
    context = context_of({"documents": DOCUMENTS})
    lengths = torch.tensor(DOCUMENTS).diff().tolist()
    p: Any = make_problem(LENGTH, (4, 2, 1), (8, 12), lengths=lengths, states=False)
    basis = orthonormal(
        torch.randn(2, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )
    weight = torch.randn(
        1, LENGTH, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )

    def run(p: Any, w: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        p, s = p.leaves(), basis.clone().requires_grad_()
        o, _ = chunk_sketched_gka(p.q, p.k, p.v, s, p.g, p.g, p.alpha, beta=p.beta, **options)
        named = p.tensors() | {"sketch": s}
        return o.detach(), dict(
            zip(named, torch.autograd.grad((o * w).sum(), list(named.values())), strict=True)
        )

    here = slice(context.begin, context.end)
    o, grads = run(p.tokens(context.begin, context.end), weight[:, here], context=context)
    expected, wanted = run(p, weight, cu_seqlens=p.cu_seqlens)
    dist.all_reduce(grads["sketch"])
    parts = {n: x if n == "sketch" else x[:, here] for n, x in wanted.items()}
    return {"o": relative_error(o, expected[:, here])} | {
        n: relative_error(grads[n], x) for n, x in parts.items()
    }


def told(wrong: Callable[[], Any]) -> str:
    """The error's text."""
    with pytest.raises(InputError) as raised:
        wrong()
    return str(raised.value)


def errors() -> dict[str, str]:
    """What each wrong call raises, by words that must be in it."""
    bounds = torch.tensor([0, 300])
    p: Any = make_problem(70, states=False)
    context = context_of({})
    mine = p.tokens(0, context.end - context.begin if context.rank == 0 else 1)
    whole_bounds: Any = {"cu_seqlens": torch.tensor([0, len(mine.q[0])])}
    return {
        "rise from 0 to the row's 440 tokens": told(lambda: ContextParallel(None, RANGES, bounds)),
        "too few for 4 ranks": told(lambda: ContextParallel.even(None, 150)),
        "shard takes whole rows": told(lambda: context.shard(p.q)),
        "context.shard": told(lambda: chunk_gka(p.q, p.k, p.v, context=context)),
    } | (
        {"the context holds the bounds": told(
            lambda: chunk_gka(mine.q, mine.k, mine.v, context=context, **whole_bounds)
        )} if context.rank == 0 else {}
    )  # fmt: skip
