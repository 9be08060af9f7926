"""Memories of one head: write N key-value pairs, then read with every written key.

Each but `exact_ridge` is a public op without decay, with alpha = scale = 1 and beta = 1 (DeltaNet: given).
It is called twice: to write, keeping the final state, and to read, with zero keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.evaluation.results import check_entries
from gka.maths.solvers.exact import exact_solve
from gka.ops import chunk_gka, chunk_simple_gla
from gka.ops.delta_rule import chunk_gated_delta_rule


@dataclass(frozen=True)
class Memory:
    """A named way to store pairs in a state of constant size.

    Attributes:
        name: unique among the memories of a test.
        family: "linear attention", "deltanet", "gka" or "exact ridge".
        recall: (k [B,N,K], v [B,N,V]) -> o [B,N,V], the readout of each key after all N writes.
        ridge_ratio: a in lambda = a |H|_F, if the family has a ridge.
        num_iter: Chebyshev steps, if the family has them.
    """

    name: str
    family: str
    recall: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    ridge_ratio: float | None = None
    num_iter: int | None = None

    def describe(self) -> dict[str, Any]:
        """The memory as JSON-ready data, without its code."""
        fields = asdict(self)
        del fields["recall"]
        return fields


def linear_attention() -> Memory:
    """o = (sum_i k_i v_i^T)^T q."""
    return Memory("linear attention", "linear attention", _recall_of(chunk_simple_gla))


def deltanet(beta: float) -> Memory:
    """One pass of the delta rule, S <- S + beta k (v - S^T k)^T.

    beta = 1 stores the newest pair exactly; a smaller beta changes the older pairs less.
    """

    def op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return chunk_gated_delta_rule(q, k, v, beta=k.new_full(k.shape[:3], beta), **options)

    return Memory(f"DeltaNet beta={beta:g}", "deltanet", _recall_of(op))


def gated_kalmanet(ridge_ratio: float, num_iter: int) -> Memory:
    """o = U^T x with x from `num_iter` Chebyshev steps on (H + lambda I) x = q."""
    op = partial(chunk_gka, ridge_ratio=ridge_ratio, num_iter=num_iter)
    name = f"GKA a={ridge_ratio:g} r={num_iter}"
    return Memory(name, "gka", _recall_of(op), ridge_ratio, num_iter)


def exact_ridge(ridge_ratio: float) -> Memory:
    """GKA's ridge regression solved by Cholesky in float64: the limit of its iteration."""

    def recall(k: Tensor, v: Tensor) -> Tensor:
        keys, values = k.double(), v.double()
        h = keys.mT @ keys
        lamb = ridge_ratio * torch.linalg.matrix_norm(h)
        x = exact_solve(h.unsqueeze(1), keys, lamb.unsqueeze(1))
        return (x @ (keys.mT @ values)).to(v.dtype)

    return Memory(f"exact ridge a={ridge_ratio:g}", "exact ridge", recall, ridge_ratio)


def compared_memories(ridge_ratios: Sequence[float], num_iters: Sequence[int]) -> list[Memory]:
    """Linear attention, DeltaNet at beta 1 and 1/2, GKA at every (ridge_ratio, num_iter), exact ridges.

    Raises:
        InputError: a value is repeated or out of range; the message names it.
    """
    for name, entries, least in (("ridge_ratios", ridge_ratios, 0), ("num_iters", num_iters, 1)):
        check_entries(**{name: tuple(entries)})
        if not all(least <= entry < float("inf") for entry in entries) or 0 in entries:
            wanted = "above 0" if least == 0 else "of 1 or more"
            raise InputError(f"{name} is {tuple(entries)}; expected numbers {wanted}")
    gka = [gated_kalmanet(a, r) for a in ridge_ratios for r in num_iters]
    return [linear_attention(), deltanet(1.0), deltanet(0.5), *gka, *map(exact_ridge, ridge_ratios)]


def _recall_of(op: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The recall function of an op: op(q, k, v, scale=, ...) -> (o, state)."""

    def recall(k: Tensor, v: Tensor) -> Tensor:
        k, v = k.unsqueeze(2), v.unsqueeze(2)  # one head: [B,N,1,D]
        _, state = op(k, k, v, scale=1.0, output_final_state=True)
        nothing = torch.zeros_like(k), torch.zeros_like(v)
        o, _ = op(k, *nothing, scale=1.0, initial_state=state)
        return o.squeeze(2)

    return recall
