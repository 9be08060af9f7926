"""Solvers that choose their own steps, through the public ops: exact where their error is small enough."""

import pytest
import torch

from gka.ops import chunk_gka, fused_recurrent_gka
from problems import SOLVER_PROBLEMS as PROBLEMS
from problems import Problem, chunkwise, differentiate, make_problem, oracle
from tolerances import RELATIVE, assert_close

EXACT_AT = 120  # 2 R^121 < 1e-14 at a = 0.02
SOLVERS = ("adaptive", "cg")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("name", PROBLEMS)
def test_results_and_gradients_are_those_of_the_exact_map(name, op, solver):
    """With r where the proven error is below 1e-14: outputs, states and every gradient equal the oracle's,
    whose gradients are autograd's."""
    problem = PROBLEMS[name]
    results, grads = differentiate(chunkwise, problem, op=op, num_iter=EXACT_AT, solver=solver)
    exact, exact_grads = differentiate(oracle, problem)
    for x, y in zip(results, exact, strict=True):
        assert_close(x, y, RELATIVE[torch.float64])
    for key, grad in grads.items():
        assert_close(grad, exact_grads[key], 1e-9, f"d{key}")


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver):
    """Every gradient in float64 matches finite differences (30 steps at a = 0.5 leave 4e-18)."""
    p = make_problem(5, (2, 1, 2), (3, 2), decay="separate", states=False).leaves()
    names = list(p.tensors())

    def run(*inputs):
        x = Problem(**{**vars(p), **dict(zip(names, inputs, strict=True))})
        return chunkwise(x, ridge_ratio=0.5, chunk_size=2, solver=solver)

    assert torch.autograd.gradcheck(run, tuple(p.tensors().values()), fast_mode=False)
