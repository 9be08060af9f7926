"""Claim: NaN and infinity at a token reach it and later ones of its own sequence and head, no others."""

import pytest
import torch

from gka.ops import chunk_gka
from problems import Problem, chunkwise, make_problem

BAD = [torch.nan, torch.inf]


def spoil(problem: Problem, name: str, t: int, value: float) -> Problem:
    x = getattr(problem, name).clone()
    x[0, t, 1] = value
    return Problem(**{**vars(problem), name: x})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "gk", "alpha", "beta"])
def test_forward(name, solver, value):
    """One bad number in head 1 of sequence 0 at token 40: all else is what it was, bit for bit."""
    base = make_problem(100, batch=2, decay="separate", dtype=torch.float32)
    options = {"backend": "torch", "solver": solver}
    o, h, u = chunkwise(base, **options)
    o_bad, h_bad, u_bad = chunkwise(spoil(base, name, 40, value), **options)
    assert torch.equal(o_bad[1], o[1]) and torch.equal(o_bad[0, :, 0], o[0, :, 0])
    assert torch.equal(o_bad[0, :40], o[0, :40])
    assert not torch.isfinite(o_bad[0, 40, 1]).any()
    for found, expected in ((h_bad, h), (u_bad, u)):
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0, 0], expected[0, 0])
    assert torch.isfinite(u_bad[0, 1]).all() == (name in ("q", "gk", "alpha"))
    assert torch.isfinite(h_bad[0, 1]).all() == (name in ("q", "v", "g", "alpha"))


def test_packed_sequences_are_apart():
    """Sequences packed behind a spoilt one in the same chunk are what they were, their states too."""
    base = make_problem(100, lengths=[30, 0, 31, 39], dtype=torch.float32)
    o, h, u = chunkwise(base, backend="torch")
    o_bad, h_bad, u_bad = chunkwise(spoil(base, "k", 40, torch.nan), backend="torch")
    untouched = [*range(40), *range(61, 100)]
    assert torch.equal(o_bad[:, untouched], o[:, untouched])
    assert torch.isnan(o_bad[0, 40:61, 1]).all()
    for found, expected in ((h_bad, h), (u_bad, u)):
        assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])
        assert torch.isnan(found[2, 1]).all()


@pytest.mark.parametrize("name", ["k", "v", "beta", "g"])
def test_gradients_before_it(name):
    """A loss of earlier outputs alone has the gradients it would have without the bad number."""
    base = make_problem(100, dtype=torch.float32)

    def gradients(problem: Problem):
        leaves = problem.leaves()
        chunkwise(leaves, backend="torch")[0][:, :40].square().sum().backward()
        return {n: x.grad for n, x in leaves.tensors().items()}

    expected = gradients(base)
    for n, grad in gradients(spoil(base, name, 40, torch.nan)).items():
        assert torch.equal(grad, expected[n]), n  # pyright: ignore


@pytest.mark.parametrize("where", ["output", "q"])
def test_gradients_behind_it(where):
    """NaN in the gradient of o_t, or in q_t, reaches token t and earlier ones of its head; none behind it."""
    base = make_problem(100, dtype=torch.float32)
    leaves = (spoil(base, "q", 40, torch.nan) if where == "q" else base).leaves()
    weight = torch.ones(1, 100, 2, 1)
    if where == "output":
        weight[0, 40, 1] = torch.nan
    (chunkwise(leaves, backend="torch")[0] * weight).sum().backward()
    for name in ("k", "v", "g", "beta"):
        grad = getattr(leaves, name).grad
        assert torch.isfinite(grad[:, 41:]).all() and torch.isfinite(grad[:, :, 0]).all(), name
        assert torch.isnan(grad[:, :41, 1]).all(), name
    assert leaves.q is not None and torch.isfinite(leaves.q.grad[:, 41:]).all()  # pyright: ignore


def test_nothing_is_hidden():
    """A loss of spoilt outputs has no finite gradient of the keys it came from."""
    base = make_problem(100, dtype=torch.float32)
    leaves = spoil(base, "v", 40, torch.nan).leaves()
    chunkwise(leaves, backend="torch")[0].sum().backward()
    assert leaves.k.grad is not None and torch.isnan(leaves.k.grad[:, :, 1]).all()


def test_states_that_are_not_finite():
    """NaN in an initial state reaches all of its own sequence and head, no other."""
    base = make_problem(70, batch=2, dtype=torch.float32)
    assert base.u0 is not None
    u0 = base.u0.clone()
    u0[0, 1, 0, 0] = torch.nan
    o = chunkwise(base, backend="torch")[0]
    bad = chunkwise(Problem(**{**vars(base), "u0": u0}), backend="torch")[0]
    assert torch.equal(bad[1], o[1]) and torch.equal(bad[0, :, 0], o[0, :, 0])


def test_no_tokens():
    """A call without tokens is not looked at."""
    q = torch.zeros(1, 0, 2, 16)
    assert chunk_gka(q, q, q, backend="torch")[0].shape == (1, 0, 2, 16)
