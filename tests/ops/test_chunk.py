"""chunk_gka against the token-by-token reference: results and every gradient."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch

from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from problems import Decay, Problem, chunkwise, differentiate, make_problem, oracle, reference
from tolerances import RELATIVE, assert_close

HEADS = [(2, 2, 2), (4, 2, 1), (4, 1, 4), (2, 2, 1), (3, 1, 1), (4, 4, 2)]
LENGTHS = [1, 63, 64, 65, 200, 500]
BOUNDS = [0, 1, 15, 64, 200, 500]
PACKED = {
    "as bounds": [b - a for a, b in itertools.pairwise(BOUNDS)],
    "as lengths": BOUNDS,  # the first sequence is empty
}
DECAYS = get_args(Decay)
EXACT_AT = 120  # 2 R^121 < 1e-14 at a = 0.02


def problems() -> dict[str, Problem]:
    """Every length with every head layout in turn, decays and gates in turn; packed sequences."""
    table = {
        f"T={length}": make_problem(
            length, HEADS[i], (16, 20), decay=DECAYS[i % 3], batch=1 + i % 2
        )
        for i, length in enumerate(LENGTHS[:-1])
    }
    table["T=500"] = make_problem(500, (2, 1, 2), (8, 6), decay="separate")
    for i, (name, lengths) in enumerate(PACKED.items()):
        table[f"packed {name}"] = make_problem(
            0, HEADS[i], (8, 8), decay=DECAYS[i], lengths=lengths
        )
    return table


PROBLEMS = problems()


@pytest.fixture(params=PROBLEMS)
def problem(request) -> Problem:
    return PROBLEMS[request.param]


def test_results_are_those_of_the_reference(problem):
    """Chunk-wise and token by token agree within 1e-10 at the same num_iter: output and both states."""
    expected = reference(problem, num_iter=30)
    for name, x, y in zip(("o", "h", "u"), chunkwise(problem), expected, strict=True):
        assert_close(x, y, RELATIVE[torch.float64], name)


def test_gradients_are_those_of_the_exact_map(problem):
    """All gradients, from the output and both final states: within 1e-9 of autograd through the Cholesky
    solve where truncation is negligible, and within 4 sqrt(kappa) 2 R^31 (9.2e-3) of it at 30 steps.

    (test_truncation.py bounds the latter term by term.)
    """
    _, expected = differentiate(oracle, problem)
    kappa = 1.02 / 0.02
    for num_iter, tolerance in ((EXACT_AT, 1e-9), (30, 4 * kappa**0.5 * chebyshev_bound(0.02, 30))):
        _, grads = differentiate(chunkwise, problem, num_iter=num_iter)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert grad.dtype == torch.float64
            assert_close(grad, expected[name], tolerance, f"d{name} at {num_iter} steps")


@pytest.mark.parametrize("dims", [(1, 1), (1, 3), (3, 1), (20, 64), (64, 20), (100, 16), (16, 100)])
def test_any_head_dimensions(dims):
    """K and V need be neither equal nor powers of two: results and gradients are exact."""
    problem = make_problem(70, (2, 1, 2), dims)
    results, grads = differentiate(chunkwise, problem, num_iter=EXACT_AT)
    expected, expected_grads = differentiate(oracle, problem)
    for x, y in zip(results, expected, strict=True):
        assert_close(x, y, RELATIVE[torch.float64])
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-9, f"d{name}")


@pytest.mark.parametrize("gates", ["", "a", "b", "ab"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("states", [True, False])
def test_every_choice_of_gates(decay, gates, states):
    """Tied, separate and absent decays, with and without alpha, beta and initial states: all exact."""
    problem = make_problem(20, (4, 2, 1), (6, 5), decay=decay, gates=gates, states=states)
    settings = {"num_iter": EXACT_AT, "chunk_size": 8}
    results, grads = differentiate(chunkwise, problem, **settings)
    expected, expected_grads = differentiate(oracle, problem)
    assert_close(results[0], expected[0], RELATIVE[torch.float64], "o")
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-9, f"d{name}")


def test_tied_gradient_is_the_sum_of_both():
    """g passed twice, and g with an equal gk: the same results; the tied gradient is the sum."""
    tied = make_problem(70)
    assert tied.g is not None
    separate = Problem(**{**vars(tied), "gk": tied.g.clone(), "tied": False})
    results, grads = differentiate(chunkwise, tied)
    same, parts = differentiate(chunkwise, separate)
    for x, y in zip(results, same, strict=True):
        assert_close(x, y, 1e-14)
    assert_close(grads["g"], parts["g"] + parts["gk"], 1e-12, "dg")


@pytest.mark.parametrize("chunk_size", [1, 16, 100, 150])
def test_chunk_size_does_not_matter(chunk_size):
    """Chunks of 1, 16, 64, 100 and more tokens than there are: the same results and gradients."""
    problem = make_problem(0, (4, 2, 1), (8, 6), lengths=[30, 0, 101])
    expected, expected_grads = differentiate(chunkwise, problem)
    results, grads = differentiate(chunkwise, problem, chunk_size=chunk_size)
    for x, y in zip(results, expected, strict=True):
        assert_close(x, y, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-11, f"d{name}")


@pytest.mark.parametrize("name", ["T=65", "T=200", "packed as lengths"])
def test_recurrent_form_is_the_same_map(name):
    """fused_recurrent_gka equals chunk_gka at any number of tokens; so do all its gradients."""
    expected, expected_grads = differentiate(chunkwise, PROBLEMS[name])
    results, grads = differentiate(chunkwise, PROBLEMS[name], op=fused_recurrent_gka)
    for x, y in zip(results, expected, strict=True):
        assert_close(x, y, RELATIVE[torch.float64])
    for key, grad in grads.items():
        assert_close(grad, expected_grads[key], 1e-9, f"d{key}")


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_reference_backend_is_the_same_map(op):
    """backend="reference" takes the same arguments and gives the same results, packed and grouped."""
    problem = make_problem(0, (4, 2, 1), (8, 6), lengths=[3, 0, 30])
    for x, y in zip(
        chunkwise(problem, op=op, backend="reference"), chunkwise(problem, op=op), strict=True
    ):
        assert_close(x, y, RELATIVE[torch.float64])


def gla(problem: Problem, **settings):
    """chunk_simple_gla as a form of the map; its H is the given one, untouched."""
    p = problem
    assert p.h0 is not None
    o, u = chunk_simple_gla(
        p.q, p.k, p.v, p.g, scale=1.0, initial_state=p.u0, output_final_state=True,
        cu_seqlens=p.cu_seqlens, beta=p.beta, **settings,
    )  # fmt: skip
    assert u is not None
    return o, p.h0 * 1.0, u


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gated_linear_attention_is_the_map_without_its_ridge(backend):
    """chunk_simple_gla equals chunk_gka with num_iter = 0, and with alpha = 0: results and gradients."""
    problem = make_problem(0, (4, 2, 1), (8, 6), gates="b", decay="of U only", lengths=[70, 0, 5])
    (o, _, u), grads = differentiate(gla, problem, backend=backend)
    zero = Problem(**{**vars(problem), "alpha": torch.zeros_like(problem.q[..., 0])})
    for other, settings in ((problem, {"num_iter": 0}), (zero, {"num_iter": 30})):
        (o_, _, u_), grads_ = differentiate(chunkwise, other, **settings)
        assert_close(o_, o, RELATIVE[torch.float64], "o")
        assert_close(u_, u, RELATIVE[torch.float64], "u")
        for name in ("q", "v", "g", "u0"):
            assert_close(grads_[name], grads[name], 1e-10, f"d{name}")


def test_num_iter_0_still_keeps_h():
    """Without a solve the final H and its gradients (to k, beta, gk, h0) are those of the reference."""
    problem = make_problem(70, (4, 2, 1), (8, 6), decay="separate")
    results, grads = differentiate(chunkwise, problem, num_iter=0)
    expected, expected_grads = differentiate(reference, problem, num_iter=0)
    for x, y in zip(results, expected, strict=True):
        assert_close(x, y, 1e-12)
    for name in expected_grads.keys() - {"alpha"}:
        assert_close(grads[name], expected_grads[name], 1e-11, f"d{name}")


def test_scale_and_ridge_ratio():
    """scale multiplies the output and is K^-1/2 by default; ridge_ratio is the a of lambda = a F."""
    problem = make_problem(20, dims=(9, 4))
    half, _ = chunk_gka(problem.q, problem.k, problem.v, scale=0.5)
    default, _ = chunk_gka(problem.q, problem.k, problem.v)
    assert_close(default, half * 2 / 3, 1e-14)
    (o, *_), grads = differentiate(chunkwise, problem, ridge_ratio=0.3, num_iter=40, scale=0.7)
    (expected, *_), expected_grads = differentiate(oracle, problem, ridge_ratio=0.3, scale=0.7)
    assert_close(o, expected, 1e-12)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-9, f"d{name}")


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_a_solution_much_smaller_than_its_query_keeps_its_digits(op) -> None:
    """Few large keys: x is 1e-4 of q, and U^T z is small only if z is accurate. alpha = 1 is x itself."""
    small = make_problem(6, dims=(8, 8), gates="a", states=False)
    assert small.alpha is not None
    large = replace(small, k=300.0 * small.k, alpha=torch.ones_like(small.alpha))

    def run(problem: Problem) -> torch.Tensor:
        p = problem
        return op(p.q, p.k, p.v, p.g, p.g, p.alpha, backend="torch")[0]

    expected, found = run(large), run(large.map(lambda x: x.float()))
    assert_close(found, expected, RELATIVE[torch.float32])
    assert torch.equal(found, run(replace(large.map(lambda x: x.float()), alpha=None)))
