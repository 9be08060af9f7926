"""Property 4: what must not matter does not matter at all."""

from dataclasses import replace

import pytest
import torch

from problems import Problem, chunkwise, make_problem
from tolerances import assert_close


def test_order_of_the_past_does_not_matter_without_decay() -> None:
    """Keys permuted within the past, no decay: the last output is the same."""
    p = make_problem(100, (1, 1, 1), (8, 5), decay="absent", gates="")
    order = torch.cat([torch.randperm(99), torch.tensor([99])])
    permuted = replace(p, k=p.k[:, order], v=p.v[:, order])
    assert_close(chunkwise(permuted)[0][:, -1], chunkwise(p)[0][:, -1], 1e-10, "last output")


@pytest.mark.parametrize("dim", [0, 2])
def test_batch_rows_and_heads_are_independent(dim: int) -> None:
    """Another row's or head's inputs changed: bitwise the same results in this one."""
    p = make_problem(70, (2, 2, 2), (8, 5), batch=2)
    other = replace(p, **{n: _zero(n, x, dim) for n, x in p.tensors().items()})
    o, changed = chunkwise(p)[0], chunkwise(other)[0]
    assert torch.equal(o.select(dim, 0), changed.select(dim, 0))
    assert not torch.equal(o.select(dim, 1), changed.select(dim, 1))


def _zero(name: str, x: torch.Tensor, dim: int) -> torch.Tensor:
    """x with row or head 1 set to zero; heads of states come second."""
    if dim == 2 and name in ("h0", "u0"):
        dim = 1
    return x.index_fill(dim, torch.tensor([1]), 0.0)


@pytest.mark.parametrize("at", [0, 31, 63, 64, 65, 98])
def test_causality_is_exact(at: int) -> None:
    """The output at `at` and before has exactly no gradient from any later input."""
    p = make_problem(100, (2, 1, 1), (8, 5)).leaves()
    chunkwise(p, num_iter=4)[0][:, : at + 1].sum().backward()
    for name in ("q", "k", "v", "g", "alpha", "beta"):
        later = getattr(p, name).grad[:, at + 1 :]
        assert torch.count_nonzero(later) == 0, name


def test_right_padding_has_no_influence() -> None:
    """Tokens after the last one that counts change neither earlier outputs nor the state of a packed call."""
    p = make_problem(100, (2, 1, 1), (8, 5))
    short = p.tokens(None, 70)
    padded: Problem = replace(p, k=p.k.clone(), v=p.v.clone())
    padded.k[:, 70:] = 1e3
    assert torch.equal(chunkwise(padded)[0][:, :64], chunkwise(short)[0][:, :64])
    assert_close(chunkwise(padded)[0][:, :70], chunkwise(short)[0], 1e-12, "outputs")
