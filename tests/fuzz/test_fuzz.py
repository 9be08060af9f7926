"""The fuzz itself, and a small run of it."""

import math

import pytest
import torch

from fuzz import truth
from fuzz.command import run
from fuzz.compare import judge
from fuzz.draw import draw_call
from fuzz.invalid import attempt
from gka.maths.delta import delta_rule_sequence
from gka.ops import chunk_gka
from problems import differentiate, make_problem, oracle, reference
from tolerances import assert_close


@pytest.mark.filterwarnings(
    "ignore"
)  # of the prototypes that wrong calls are made of, and of NumPy's
def test_a_small_run_finds_nothing():
    """200 random calls are right against float64, and 150 wrong ones are refused by name in one line."""
    report = run(seed=1, valid=200, invalid=150, minutes=10.0)
    assert not report.failed, report.show()
    assert report.valid["right"] > 190 and report.invalid["refused"] == 150, report.show()


def test_its_truth_is_the_reference():
    """All solves at once are `reference_sequence`'s, to rounding; packed sequences and states too."""
    problem = make_problem(0, (4, 2, 1), (8, 5), lengths=[5, 0, 9])
    got = truth.answer(problem, truth.gka_sequence, scale=0.5, ridge_ratio=0.02, num_iter=30)
    expected = reference(problem, scale=0.5, num_iter=30)
    for x, y in zip(got.values(), expected, strict=True):
        assert_close(x, y, 1e-13)


def test_its_delta_rule_is_the_definition():
    """The loop with roundings in it is `delta_rule_sequence` without them."""
    p = make_problem(9, decay="of U only", batch=2)
    got = truth.answer(p, truth.delta_sequence, scale=0.5)
    o, state = delta_rule_sequence(p.q, p.k, p.v, p.g, p.beta, p.u0, scale=0.5)  # pyright: ignore[reportArgumentType]
    assert_close(got["o"], o, 1e-14)
    assert_close(got["u"], state, 1e-14)


def test_its_derivative_is_that_of_the_exact_solve():
    """With 120 steps it equals the oracle's, which autograd finds through a Cholesky factor."""
    problem = make_problem(12, (2, 1, 1), (6, 4))

    def batched(p):
        with truth.as_the_library(torch.float64, True):
            found = truth.answer(p, truth.gka_sequence, scale=1.0, ridge_ratio=0.02, num_iter=120)
        return found["o"], found["h"], found["u"]

    _, got = differentiate(batched, problem)
    _, expected = differentiate(oracle, problem)
    for name, grad in expected.items():
        assert_close(got[name], grad, 1e-9, f"d{name}")


def test_it_sees_a_wrong_value():
    """An output off by a hundred roundings, and one that is NaN, are not let pass."""
    call = next(c for c in (draw_call(0, i) for i in range(50)) if str(c.work) == "torch.float32")
    call.wanted, call.used = (), ("o",)
    x = torch.randn(3, 4, dtype=torch.float64)
    changes = {"o": x.norm().item()}
    assert judge({"o": x.float()}, {"o": x}, changes, call).status == "right"
    assert judge({"o": x.float() * (1 + 1e-4)}, {"o": x}, changes, call).status == "wrong"
    assert judge({"o": x.float() * torch.nan}, {"o": x}, changes, call).status == "non-finite"
    assert judge({"o": x.float()}, {"o": x}, {"o": math.nan}, call).status == "wrong"


def test_it_sees_a_call_that_is_not_refused():
    """A call that runs is silent, an error of torch's own is obscure, one that names nothing is unnamed."""
    q = torch.randn(1, 3, 2, 4)
    assert attempt("", "q", lambda: chunk_gka(q, q, q)).status == "silent"
    assert attempt("", "q", lambda: q @ q[..., :3, :3]).status == "obscure"
    assert attempt("", "beta", lambda: chunk_gka(q, q, q[0])).status == "unnamed"
    assert attempt("", "v", lambda: chunk_gka(q, q, q[0])).status == "refused"
