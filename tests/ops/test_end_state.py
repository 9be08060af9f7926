"""What a text adds to a state: `end_state`, beside the final states of a whole pass."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.ops import chunk_gka, combine_states, end_state
from problems import make_problem
from tolerances import assert_close

PROBLEMS = {
    "tied": make_problem(150, (4, 2, 1), decay="tied", batch=2),
    "separate": make_problem(128, (4, 1, 2), (16, 8), decay="separate"),
    "no decay, no gate": make_problem(70, decay="absent", gates=""),
    "of H only": make_problem(70, (2, 2, 1), decay="of H only"),
    "packed": make_problem(0, (4, 2, 4), (8, 16), decay="separate", lengths=[0, 1, 200, 63, 0]),
    "longer than a chunk": make_problem(2050, (2, 1, 1), (4, 4), decay="tied"),
}


def ends(p: Any, **options: Any) -> Any:
    gk = p.g if p.tied else p.gk
    return end_state(p.k, p.v, p.g, gk, p.beta, p.cu_seqlens, num_heads=p.q.shape[2], **options)


def passed(p: Any, state: Any) -> Any:
    """The final states of a whole pass."""
    gk = p.g if p.tied else p.gk
    _, final = chunk_gka(
        p.q, p.k, p.v, p.g, gk, num_iter=0, initial_state=state, output_final_state=True,
        cu_seqlens=p.cu_seqlens, beta=p.beta,
    )  # fmt: skip
    return final


def gradients(p: Any, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = [name for name in ("k", "v", "g", "gk", "beta") if getattr(p, name) is not None]
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results
    )
    found = torch.autograd.grad(torch.as_tensor(total), [getattr(p, name) for name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", PROBLEMS)
def test_faded_past_and_what_a_text_adds_are_a_whole_pass(name: str):
    """exp(totals) S + end_state is the final state of a pass from S, to 1e-12 with all gradients: those of
    the totals, through which S fades, among them."""
    p: Any = PROBLEMS[name].leaves()
    expected = passed(p, (p.h0, p.u0))
    wanted = gradients(p, expected)
    totals, h, u, _ = ends(p)
    found = combine_states((p.h0, p.u0), (h, u), totals.g, totals.gk)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-12)
    for gradient, x in gradients(p, found).items():
        assert_close(x, wanted[gradient], 1e-12, gradient)


@pytest.mark.parametrize("name", ["separate", "packed"])
def test_chunk_starts_count_from_zero(name: str):
    """With return_starts, the states at each chunk's start are those after the tokens before it."""
    p: Any = PROBLEMS[name]
    h_start, u_start = ends(p, return_starts=True, chunk_size=32).starts
    bounds = [0, len(p.q[0])] if p.cu_seqlens is None else p.cu_seqlens.tolist()
    chunk = 0
    for begin, end in itertools.pairwise(bounds):
        for at in range(begin, end, 32):
            before = make_part(p, begin, at)
            _, h, u, _ = ends(before)
            assert_close(h_start[chunk], h[0], 1e-12)
            assert_close(u_start[chunk], u[0], 1e-12)
            chunk += 1
    assert chunk == len(h_start)


def make_part(p: Any, begin: int, end: int) -> Any:
    return replace(p.tokens(begin, end), cu_seqlens=None)


def test_a_hard_reset_hides_what_was_before():
    """A log decay of -inf leaves a finite end state and gradients: the tokens after it alone count."""
    p: Any = make_problem(150, decay="tied")
    g = p.g.clone()
    g[:, 100] = -torch.inf
    k, v = p.k.clone().requires_grad_(), p.v.clone().requires_grad_()
    g.requires_grad_()
    _, h, u, _ = end_state(k, v, g, g, p.beta)
    (h.sum() + u.sum()).backward()
    _, *expected, _ = end_state(*(x[:, 100:] for x in (k, v, p.g, p.g, p.beta)))
    assert_close(h, expected[0], 1e-12)
    assert_close(u, expected[1], 1e-12)
    assert k.grad is not None and g.grad is not None
    assert not k.grad[:, :100].any() and bool(g.grad.isfinite().all())


def test_second_derivatives_are_refused():
    """A second derivative raises; it is not zero in silence."""
    p: Any = make_problem(20).leaves()
    _, h, _, _ = ends(p)
    (dk,) = torch.autograd.grad(h.sum(), p.k, create_graph=True)
    with pytest.raises(RuntimeError, match="end_state"):
        dk.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "multiple"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "reference"}, "no scan"),
        ({"backend": "unknown"}, "backend must be one of"),
    ],
)
def test_wrong_calls_are_told(change: dict, message: str):
    """Heads that do not divide, chunk sizes and backends out of range raise with their name."""
    p: Any = make_problem(20, (4, 2, 2), decay="absent", gates="")
    with pytest.raises(ValueError, match=message):
        end_state(p.k, p.v, **{"num_heads": 4, **change})
