"""Repetitions of a text are found as by comparing n-grams one by one, and losses are split among them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gka.errors import InputError
from gka.evaluation.repeats import (
    Repeats,
    by_slice,
    gaps,
    ngram_hashes,
    seen_in,
    token_losses,
)

RNG = np.random.default_rng(0)


def ends(row: np.ndarray, n: int) -> list[tuple[int, ...] | None]:
    """The n-gram that ends at each token."""
    return [None if t < n - 1 else tuple(row[t - n + 1 : t + 1].tolist()) for t in range(len(row))]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gaps_are_those_of_a_direct_search(n: int) -> None:
    """The distance to the latest earlier end of the same n-gram in the same row, 0 without one."""
    rows = RNG.integers(0, 3, (4, 60))
    found = gaps(rows, n)
    for row, distances in zip(rows, found, strict=True):
        grams = ends(row, n)
        for t, gram in enumerate(grams):
            before = [s for s in range(t) if gram is not None and grams[s] == gram]
            assert distances[t] == (t - before[-1] if before else 0)


@pytest.mark.parametrize("n", [1, 4])
def test_what_a_corpus_has_is_found(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """n-grams are those within one array of the corpus; hashing it in parts loses none at their borders."""
    monkeypatch.setattr("gka.evaluation.repeats.PART", 7)
    rows = RNG.integers(0, 4, (3, 50))
    corpus = [RNG.integers(0, 4, length).astype(np.uint16) for length in (0, 2, 40, 33)]
    known = {gram for ids in corpus for gram in ends(ids, n)} - {None}
    expected = [[gram in known for gram in ends(row, n)] for row in rows]
    assert np.array_equal(seen_in(rows, n, corpus), expected)
    assert not seen_in(rows, n, []).any()


def test_short_rows_and_bad_sizes() -> None:
    """A row shorter than an n-gram repeats nothing; n below 1 is refused."""
    assert not gaps(np.zeros((2, 3), int), 4).any()
    assert not seen_in(np.zeros((2, 3), int), 4, [np.zeros(9, int)]).any()
    with pytest.raises(InputError, match="n is 0; expected 1 or more"):
        ngram_hashes(np.zeros(5), 0)


def test_slices_part_the_predicted_tokens() -> None:
    """New and repeated are all tokens but the first; recalled ones are repeated and not in training."""
    rows = np.array([[7, 8, 9, 1, 7, 8, 9, 7, 8]])
    repeats = Repeats.of(rows, 2, [np.array([8, 9])])
    slices = repeats.slices(far=4)
    assert repeats.gaps.tolist() == [[0, 0, 0, 0, 0, 4, 4, 0, 3]]
    assert slices["all"].sum() == 8 == (slices["new"] ^ slices["repeated"]).sum()
    assert slices["repeated"][0].nonzero()[0].tolist() == [4, 5, 7]
    assert slices["recalled"][0].nonzero()[0].tolist() == [4, 7]
    assert slices["far"][0].nonzero()[0].tolist() == [4]


class Bigram(torch.nn.Module):
    """Predicts the next token by a table of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 5)

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table(ids))


def test_losses_are_those_of_each_token() -> None:
    """Every token but a row's first, whatever the batch; their means are those of the slices."""
    torch.manual_seed(0)
    model, rows = Bigram(), RNG.integers(0, 5, (5, 12))
    losses, right = token_losses(model, rows, 2)
    table = model.table.weight.detach().log_softmax(-1).numpy()
    np.testing.assert_allclose(losses, -table[rows[:, :-1], rows[:, 1:]], rtol=1e-5)
    assert np.array_equal(right, table[rows[:, :-1]].argmax(-1) == rows[:, 1:])
    mask = np.zeros_like(right)
    mask[1, 3] = mask[2, 5] = True
    found = by_slice(losses, right, {"two": mask, "none": np.zeros_like(right)})
    assert found["two"]["tokens"] == 2
    assert found["two"]["loss"] == pytest.approx((losses[1, 3] + losses[2, 5]) / 2)
    assert found["two"]["accuracy"] == pytest.approx((int(right[1, 3]) + int(right[2, 5])) / 2)
    assert found["none"] == {"tokens": 0, "loss": None, "accuracy": None}
