"""Ops whose sequence is split over 4 ranks, against one process. One start of the processes for all cases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gka.errors import InputError
from gka.parallel import even_ranges
from gka.parallel.context import check_ranges
from parallel.ranks import (
    OP_CASES,
    all_ops,
    call,
    gradients,
    on_ranks,
    problem_of,
    upstream_of,
    whole,
)
from tolerances import assert_close, relative_error


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(all_ops, tmp_path_factory.mktemp("ranks"))


def joined(parts: list[Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """o, final states and gradients of the whole sequences from those of the ranks."""
    outputs = [torch.cat([part["results"][0] for part in parts], 1)]
    for n in range(1, len(parts[0]["results"])):
        ended = {
            number: part["results"][n][place]
            for part in parts
            for place, (number, ends) in enumerate(zip(part["numbers"], part["ends"], strict=True))
            if ends
        }
        outputs.append(torch.stack([ended[number] for number in sorted(ended)]))
    grads: Any = {
        name: sum(part["grads"][name] for part in parts)
        if name in ("h0", "u0")
        else torch.cat([part["grads"][name] for part in parts], 1)
        for name in parts[0]["grads"]
    }
    return outputs, grads


# Conjugate gradients amplify rounding: inputs changed in their last bit move a gradient by 7e-12.
LOOSER = {"cg": 2e-11}


@pytest.mark.parametrize("name", OP_CASES)
def test_ranks_compute_what_one_process_does(name: str, found: list[Any]) -> None:
    """Outputs, final states and every gradient within 1e-12 of one process, in float64."""
    outputs, grads = joined([rank[name, torch.float64] for rank in found])
    expected = whole(name, torch.float64)
    tolerance = LOOSER.get(name, 1e-12)
    for x, y in zip(outputs, expected["results"], strict=True):
        assert_close(x, y, tolerance)
    for of, x in expected["grads"].items():
        assert_close(grads[of], x, tolerance, of)


def test_a_sketched_call_is_split_like_a_plain_one(found: list[Any]) -> None:
    """Its two calls exchange states apart: output and every gradient, the map's summed over ranks, within
    1e-12 of one process."""
    for rank in found:
        assert set(rank["sketched"]) == {"o", "q", "k", "v", "g", "alpha", "beta", "sketch"}
        assert max(rank["sketched"].values()) < 1e-12, rank["sketched"]


@pytest.mark.parametrize("name", ["separate, grouped", "packed", "cg"])
def test_float32_loses_no_more_than_one_process(name: str, found: list[Any]) -> None:
    """No result is further from float64 than twice one process's own distance."""
    exact = joined([rank[name, torch.float64] for rank in found])
    narrow = joined([rank[name, torch.float32] for rank in found])
    alone = whole(name, torch.float32)
    for x, y, z in zip(narrow[0], alone["results"], exact[0], strict=True):
        assert relative_error(x, z) <= 2 * relative_error(y, z)
    for of, z in exact[1].items():
        assert relative_error(narrow[1][of], z) <= 2 * relative_error(alone["grads"][of], z), of


@pytest.mark.parametrize(
    ("name", "decays"), [("tied, batch", 1), ("separate, grouped", 2), ("no decay, no gates", 0)]
)
def test_bytes_that_a_layer_exchanges(name: str, decays: int, found: list[Any]) -> None:
    """One gather of the states and a decay for each gate, and one reduce-scatter of the states."""
    p: Any = problem_of(OP_CASES[name], torch.float64)
    (batch, _, heads, key), value = p.q.shape, p.v.shape[-1]
    states = batch * heads * key * (key + value)
    for rank in found:
        part = rank[name, torch.float64]
        assert part["gathered"] == [8 * (states + decays * batch * heads)]
        assert part["reduced"] == [8 * states]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 64)], "one .begin, end. for each of the group's 2 ranks; got 1"),
        ([(0, 64), (128, 192)], r"without gaps.*rank 1 has \(128, 192\) after 64"),
        ([(0, 64), (64, 64)], "none empty"),
        ([(0, 60), (60, 128)], "multiples of a chunk, 64 tokens.*rank 0 ends at 60"),
    ],
)
def test_ranges_that_do_not_fit_are_told(ranges: Any, message: str) -> None:
    """Too few, with gaps, empty, or cut inside a chunk: the error names the rank and what was expected."""
    with pytest.raises(InputError, match=message):
        check_ranges(ranges, 2, 64)


def test_even_ranges_are_whole_chunks() -> None:
    """They cover all tokens, differ by a chunk at most, and there is none without a chunk."""
    assert even_ranges(440, 4) == [(0, 64), (64, 192), (192, 320), (320, 440)]
    assert even_ranges(512, 2) == [(0, 256), (256, 512)]
    with pytest.raises(InputError, match="100 tokens are 2 chunks of 64, too few for 3 ranks"):
        even_ranges(100, 3)


def test_errors_on_ranks(found: list[Any]) -> None:
    """A call with other tokens than the rank's, with bounds, or whole bounds that do not fit."""
    for rank in found:
        for expected, told in rank["errors"].items():
            assert expected in told, told


def test_a_state_of_the_first_packed_sequence_alone() -> None:
    """initial_state with N = 1 is zero states for the other packed sequences, in results and gradients."""
    p = problem_of(OP_CASES["first state"], torch.float64).leaves()
    results = call({}, p, cu_seqlens=p.cu_seqlens)
    grads = gradients(p, results, upstream_of(results))
    q = p.map(
        lambda x: torch.cat([x, x.new_zeros(2, *x.shape[1:])]) if x.shape[1] == 2 else x
    ).leaves()
    expected = call({}, q, cu_seqlens=p.cu_seqlens)
    wanted = gradients(q, expected, upstream_of(expected))
    for x, y in zip(results, expected, strict=True):
        assert_close(x, y, 1e-14)
    for name, x in grads.items():
        assert_close(x, wanted[name][: len(x)], 1e-14, name)
