"""Models on rows that are split over 4 ranks, against one process. One start of processes for all cases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.ranks import RANGES, RANKS, on_ranks
from parallel.split_models import CASES, SIZES, all_models, joined, whole
from tolerances import assert_close, relative_error


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(all_models, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(name: str, found: list[Any]) -> None:
    """Logits, loss and every gradient of float64 within 1e-12, for every mixer; one loss on all ranks.

    Packed and padded, documents and windows over three ranks, recomputed layers.
    """
    parts = [rank[name, torch.float64] for rank in found]
    ours, theirs = joined(parts), whole(name, torch.float64)
    assert all(part["loss"].equal(parts[0]["loss"]) for part in parts)
    assert ours.keys() == theirs.keys()
    for of, x in theirs.items():
        assert_close(ours[of], x, 1e-12, of)


def test_float32_loses_no_more_than_one_process(found: list[Any]) -> None:
    """Over all gradients the ranks are no further from float64 than twice one process; so are the logits."""
    ours = joined([rank["packed", torch.float32] for rank in found])
    theirs, exact = whole("packed", torch.float32), whole("packed", torch.float64)

    def flat(x: dict[str, Tensor]) -> Tensor:
        return torch.cat([x[n].double().flatten() for n in x if n not in ("logits", "loss")])

    for of in (lambda x: x["logits"].double(), flat):
        assert relative_error(of(ours), of(exact)) <= 2 * relative_error(of(theirs), of(exact))


def test_bytes_that_layers_exchange(found: list[Any]) -> None:
    """A convolution takes three tokens from the rank before, a window its width, an attention all earlier
    ones; gradients go the same way back."""
    lengths = [end - begin for begin, end in RANGES]
    for rank, part in enumerate(rank["batch", torch.float64] for rank in found):
        following, later = rank + 1 < RANKS, RANKS - 1 - rank
        three = 8 * 2 * 3 * SIZES["hidden_size"]
        token = 8 * 2 * 2 * SIZES["num_kv_heads"] * SIZES["head_dim"]
        counted = [sum(sent) for sent in part["sent"]]
        # gka, attention, swa, gla, deltanet, gated_deltanet
        window = [
            max(0, RANGES[rank][1] - max(RANGES[rank][0], a - 299)) for a, _ in RANGES[rank + 1 :]
        ]
        assert counted[:6] == [
            three * following, token * lengths[rank] * later, token * sum(window), *3 * [three * following]
        ]  # fmt: skip
        mine = RANGES[rank][0]
        back = [three * (rank > 0)] * 3 + [token * min(299, mine), token * mine, three * (rank > 0)]
        assert counted[6:] == back


def test_wrong_calls_are_told(found: list[Any]) -> None:
    """Whole rows, their bounds, masks and positions, a cache, masks with holes: the error says what to do."""
    for rank in found:
        for expected, told in rank["errors"].items():
            assert expected in told, told
