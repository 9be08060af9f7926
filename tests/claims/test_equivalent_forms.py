"""Property 1 of the layer: every way of cutting the work gives the same outputs, states and gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from gka.ops import fused_recurrent_gka
from problems import Problem, chunkwise, differentiate, make_problem
from tolerances import assert_close

EXACT = 1e-10


def split_run(problem: Problem, cut: int, **settings) -> tuple[Tensor, Tensor, Tensor]:
    """The first `cut` tokens, then the rest from the state they leave."""
    first, h, u = chunkwise(problem.tokens(None, cut), **settings)
    rest = problem.tokens(cut, None)
    rest = Problem(**{**vars(rest), "h0": h, "u0": u})
    second, h, u = chunkwise(rest, **settings)
    return torch.cat([first, second], 1), h, u


def compare(actual: tuple, expected: tuple, tolerance: float = EXACT) -> None:
    (results, grads), (results2, grads2) = actual, expected
    for name, a, b in zip(("o", "h_kk", "h_kv"), results, results2, strict=True):
        assert_close(a, b, tolerance, name)
    for name, grad in grads2.items():
        assert_close(grads[name], grad, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 64, 99])
def test_split_in_two_with_the_state_carried_over(cut: int) -> None:
    """Two calls, the second from the first one's state, equal one call; gradients flow through it."""
    problem = make_problem(100, (4, 2, 1), (8, 5), decay="separate")
    expected = differentiate(chunkwise, problem, num_iter=8)
    compare(differentiate(lambda p, **s: split_run(p, cut, **s), problem, num_iter=8), expected)


def test_token_by_token_equals_chunk_by_chunk() -> None:
    """The recurrent op equals the chunk-wise op."""
    problem = make_problem(70, (2, 1, 2), (8, 5))
    expected = differentiate(chunkwise, problem, num_iter=8)
    actual = differentiate(
        lambda p, **s: chunkwise(p, fused_recurrent_gka, **s), problem, num_iter=8
    )
    compare(actual, expected)


def test_packed_equals_separate_sequences() -> None:
    """cu_seqlens, an empty sequence among them, equals one call for each sequence."""
    lengths = [0, 1, 15, 64, 0, 70]
    problem = make_problem(0, (2, 1, 1), (8, 5), lengths=lengths)

    def separately(p: Problem, **settings) -> tuple[Tensor, Tensor, Tensor]:
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        parts = []
        for n, (a, b) in enumerate(itertools.pairwise(bounds)):
            assert p.h0 is not None and p.u0 is not None
            state = {"h0": p.h0[n : n + 1], "u0": p.u0[n : n + 1], "cu_seqlens": None}
            parts.append(chunkwise(Problem(**{**vars(p.tokens(a, b)), **state}), **settings))
        o, h, u = zip(*parts, strict=True)
        return torch.cat(o, 1), torch.cat(h), torch.cat(u)

    expected = differentiate(separately, problem, num_iter=8)
    compare(differentiate(chunkwise, problem, num_iter=8), expected)
