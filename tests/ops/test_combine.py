"""States of texts read apart, combined at the level of the op."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gka.ops import chunk_gka, combine_states, mean_states, sum_states
from problems import Decay, make_problem
from tolerances import assert_close

State = tuple[Tensor, Tensor]


def run(
    p: Any, begin: int | None, end: int | None, state: State | None = None
) -> tuple[Tensor, State]:
    part = p.tokens(begin, end)
    gk = part.g if part.tied else part.gk
    o, final = chunk_gka(
        part.q, part.k, part.v, part.g, gk, part.alpha, beta=part.beta,
        initial_state=state, output_final_state=True,
    )  # fmt: skip
    assert final is not None
    return o, final


@pytest.mark.parametrize("decay", ["tied", "separate", "absent", "of U only", "of H only"])
def test_combined_states_are_those_of_one_pass(decay: Decay):
    """State of A, faded by B's total decay, plus state of B: that after A and B in one pass, to 1e-12;
    and what is read next is the same."""
    p: Any = make_problem(150, (4, 2, 1), decay=decay, dtype=torch.float64)
    _, a = run(p, 0, 70)
    _, b = run(p, 70, 130)
    gk = p.g if p.tied else p.gk
    g_total, gk_total = (None if x is None else x[:, 70:130].sum(1) for x in (p.g, gk))
    found = combine_states(a, b, g_total, gk_total)
    _, expected = run(p, 0, 130)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-12)
    assert_close(run(p, 130, None, found)[0], run(p, 130, None, expected)[0], 1e-12)


def test_combining_is_associative():
    """((A B) C) = (A (B C)), the decays of B and C adding up."""
    p: Any = make_problem(120, decay="tied", dtype=torch.float64)
    a, b, c = (run(p, t, t + 40)[1] for t in (0, 40, 80))
    g_b, g_c = (p.g[:, t : t + 40].sum(1) for t in (40, 80))
    left = combine_states(combine_states(a, b, g_b, g_b), c, g_c, g_c)
    right = combine_states(a, combine_states(b, c, g_c, g_c), g_b + g_c, g_b + g_c)
    for x, y in zip(left, right, strict=True):
        assert_close(x, y, 1e-13)


def test_mean_reads_what_the_sum_reads():
    """The ridge's readout is the same from the sum of states as from their mean: H and U scale together."""
    p: Any = make_problem(90, decay="absent", dtype=torch.float64)
    parts = [run(p, t, t + 40)[1] for t in (0, 40)]
    total, mean = sum_states(parts), mean_states(parts)
    for x, y, z in zip(total, mean, zip(*parts, strict=True), strict=True):
        assert_close(x, z[0] + z[1], 1e-15)
        assert_close(y, x / 2, 1e-15)
    zero = torch.zeros_like(p.k[:, :1])
    read = [
        chunk_gka(p.q[:, :1], zero, p.v[:, :1], initial_state=state)[0] for state in (total, mean)
    ]
    assert_close(read[0], read[1], 1e-12)


def test_float32_states_keep_their_dtype():
    """Totals in float64 (long texts) fade float32 states without changing their dtype."""
    p: Any = make_problem(40, decay="tied", dtype=torch.float32)
    state = run(p, 0, 40)[1]
    total = p.g.double().sum(1)
    assert all(x.dtype == torch.float32 for x in combine_states(state, state, total, total))


def test_states_that_do_not_fit_are_refused():
    """The message names the state or total, and what was given."""
    h, u = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 6)
    for call, kind, message in (
        (lambda: combine_states((h, u), (h, u[..., :5]), None), ValueError, "h_kv .* state 1"),
        (lambda: combine_states((h, u), (h.double(), u), None), TypeError, "h_kk .*float64"),
        (
            lambda: combine_states((h, u), (h, u), torch.zeros(1, 9, 2)),
            ValueError,
            r"g must be .*N, H",
        ),
        (lambda: combine_states((h, u), (h, u), None, torch.zeros(2)), ValueError, "gk must be"),
        (lambda: combine_states(h, (h, u), None), TypeError, "state 0 must be a pair"),  # type: ignore[arg-type]
        (lambda: sum_states([]), ValueError, "at least one"),
    ):
        with pytest.raises(kind, match=message):
            call()
