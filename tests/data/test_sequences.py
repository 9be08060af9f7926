"""Sequences: best fit, documents apart or running, one order for all processes, mixtures, streams."""

import os
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, default_collate

from gka.data import (
    HeldOutSequences,
    Holdout,
    PackedTokens,
    StreamedTokens,
    TrainingSequences,
    byte_tokenizer,
    find_documents,
    pack,
    sources,
    streaming,
)
from gka.data import order as orders
from gka.data.bestfit import best_fit, count_packs
from gka.data.order import Mixture, Order, permutation, windows_of
from gka.data.sequences import collate_packed
from gka.errors import InputError

SIZES = [5, 30, 1, 100, 64, 63, 17, 90, 33, 8, 8, 47, 3, 12, 70, 21]


def _best_fit_one_by_one(lengths: list[int], room: int) -> list[int]:
    """Room left in each sequence, by the definition: longest first, into the fullest that has room."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(free, number) for number, free in enumerate(left) if free >= length]
        if fitting:
            left[min(fitting)[1]] -= length
        else:
            left.append(room - length)
    return sorted(left)


@given(
    st.integers(1, 40).flatmap(
        lambda r: st.tuples(st.just(r), st.lists(st.integers(1, r), min_size=1))
    )
)
def test_packing_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    """Placing runs of equal lengths at once fills sequences exactly as one item at a time does."""
    room, lengths = case
    packs = best_fit(np.asarray(lengths), room)
    assert sorted(packs.items.tolist()) == list(range(len(lengths)))
    left = [room - sum(lengths[i] for i in packs[p]) for p in range(len(packs))]
    assert sorted(left) == _best_fit_one_by_one(lengths, room)
    assert count_packs(np.asarray(lengths), room) == len(packs)


def _corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int] = SIZES
) -> PackedTokens:
    """Documents of given sizes, letter by letter, in several shards and windows."""
    monkeypatch.setattr(sources, "LEAST_PART", 50)
    monkeypatch.setattr(orders, "WINDOW", 90)
    monkeypatch.setattr(orders, "SEQUENCES", 0)
    folder = tmp_path / "text"
    folder.mkdir()
    for i, size in enumerate(sizes):
        (folder / f"{i:03}").write_text(chr(97 + i % 26) * size)
    return pack(find_documents([str(folder)]), byte_tokenizer(), tmp_path / "cache")


def _sequences(parts: Any, length: int = 16, **changes: Any) -> TrainingSequences:
    parts = parts if isinstance(parts, list) else [parts]
    weights = changes.pop("weights", [1.0])
    return TrainingSequences(
        parts, weights, length, **{"apart": True, "pad": 256, "seed": 0} | changes
    )


def _documents(item: dict[str, torch.Tensor]) -> list[list[int]]:
    bounds = item["bounds"].tolist()
    found = [item["input_ids"][a:b].tolist() for a, b in pairwise(bounds)]
    return found[:-1] if set(found[-1]) == {256} else found


def test_an_epoch_has_every_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart: an epoch and the held-out sequences together are all documents, each piece once, long ones cut
    at multiples of the length; borders and padding are not predicted, everything else is."""
    packed = _corpus(tmp_path, monkeypatch)
    part = Holdout(packed, 0.2)
    training, held = _sequences(part), HeldOutSequences([part], 16, apart=True, pad=256)
    windows = training.corpora[0].windows
    assert len(windows) > orders.POOL
    epoch = sum(training.corpora[0].order.count(w) for w in range(len(windows)))
    items = [training[i] for i in range(epoch)]
    expected = Counter()
    for a, b in zip(packed.boundaries[:-1], packed.boundaries[1:], strict=True):
        ids = packed.tokens[a:b].tolist()
        pieces = [tuple(ids[i : i + 16]) for i in range(0, len(ids), 16)]
        expected.update(piece for piece in pieces if len(piece) > 1)
    found = Counter(tuple(d) for item in [*items, *held] for d in _documents(item))
    assert found == expected
    for item in items:
        first = item["bounds"][:-1]
        assert (item["labels"][first] == -100).all()
        inside = torch.ones(16, dtype=torch.bool)
        inside[first] = False
        padding = torch.arange(16) >= sum(map(len, _documents(item)))
        assert (item["labels"][inside & ~padding] == item["input_ids"][inside & ~padding]).all()
        assert (item["labels"][padding] == -100).all()
    again = [training[i]["input_ids"].tolist() for i in range(epoch, 2 * epoch)]
    before = [item["input_ids"].tolist() for item in items]
    assert sorted(again) == sorted(before) and again != before
    assert 0 < training.padding() < 0.5


def test_running_sequences_are_the_text_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running: the sequences of a window laid side by side are its documents laid side by side."""
    part = Holdout(_corpus(tmp_path, monkeypatch), 0.2)
    training = _sequences(part, apart=False)
    corpus = training.corpora[0]
    for window in range(len(corpus.windows)):
        plan = corpus._plan(window)
        segments = [(s, part.training(s)) for s in corpus.windows[window]]
        stream = [
            i for shard, seg in segments for a, n in zip(seg.starts, seg.lengths, strict=True)
            for i in part.corpus.shard_tokens(shard)[a : a + n]
        ]  # fmt: skip
        got = [i for sequence in range(len(plan)) for piece in plan[sequence] for i in piece]
        assert got == stream[: len(plan) * 16] and len(plan) == len(stream) // 16
    item = training[3]
    assert item.keys() == {"input_ids", "labels"} and training.collate is default_collate
    assert item["labels"][1:].equal(item["input_ids"][1:]) and item["labels"][0] == -100


@pytest.mark.parametrize("apart", [True, False])
def test_the_order_is_a_function_of_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """Any place read first, in the middle of any epoch, by one process or by two loaders, gives what reading
    from the start gives; another seed gives another order."""
    part = Holdout(_corpus(tmp_path, monkeypatch), 0.2)
    whole = _sequences(part, apart=apart)
    every = [whole[i]["input_ids"].tolist() for i in range(150)]
    for start in (1, 29, 70, 149):
        assert _sequences(part, apart=apart)[start]["input_ids"].tolist() == every[start]
    fresh = _sequences(part, apart=apart)
    loader = DataLoader(fresh, batch_sampler=[[2 * i, 2 * i + 1] for i in range(5)], num_workers=2,
                        collate_fn=fresh.collate)  # fmt: skip
    loaded = torch.cat([batch["input_ids"].reshape(-1, 16) for batch in loader])
    assert loaded.tolist() == every[:10]
    other = _sequences(part, apart=apart, seed=1)
    assert [other[i]["input_ids"].tolist() for i in range(150)] != every


def test_orders_are_fixed_by_arithmetic() -> None:
    """The permutation is SplitMix64's and no library's: the values stay, or resumed runs would change."""
    assert permutation(8, 1, 2).tolist() == [2, 7, 3, 1, 5, 6, 0, 4]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))
    mean = np.abs(np.argsort(permutation(10_000, 5)) - np.arange(10_000)).mean() / 10_000
    assert mean == pytest.approx(1 / 3, abs=0.01)


def test_a_late_position_counts_windows_but_reads_few() -> None:
    """A position deep in an epoch opens one pool; the windows before it are counted, those behind are not."""
    counted = []
    order = Order(100, lambda window: counted.append(window) or 7, seed=0)
    window, sequence = order[7 * 50 + 3]
    assert 0 <= sequence < 7 and len(counted) == 52 and window in counted
    assert windows_of([10] * 10, 1, least=30) == [range(3), range(3, 6), range(6, 10)]


def test_mixtures_keep_their_weights() -> None:
    """After any number of positions each corpus had its share of them, within a few, and each position of a
    corpus comes once and in turn."""
    weights = [0.7, 0.25, 0.05]
    mixture, seen = Mixture(weights), [0, 0, 0]
    for position in range(3000):
        corpus, place = mixture[position]
        assert place == seen[corpus]
        seen[corpus] += 1
        assert all(abs(n - w * (position + 1)) < 5 for n, w in zip(seen, weights, strict=True))
    late = Mixture(weights)[200_000]
    assert late == mixture[200_000] and late[1] == pytest.approx(weights[late[0]] * 2e5, abs=5)


def test_several_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences come from each corpus by its weight; weights that are wrong are refused with better ones."""
    parts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        part = Holdout(_corpus(tmp_path / name, monkeypatch), 0.2)
        parts.append(part)
    training = _sequences(parts, weights=[0.75, 0.25])
    picked = Counter(training.mixture[i][0] for i in range(400))
    assert picked[0] == pytest.approx(300, abs=3)
    for weights, message in (
        ([0.5, 0.4], r"with sum 0\.9; expected sum 1, such as 0\.555556,0\.444444"),
        ([1.5, -0.5], "expected numbers above 0"),
        ([1.0], "1 for 2 texts; give one for each"),
        ([float("nan"), 1.0], "expected numbers above 0"),
    ):
        with pytest.raises(InputError, match=message):
            _sequences(parts, weights=weights)


def test_held_out_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the held-out tokens holds; a corpus with nothing to learn from is refused."""
    packed = _corpus(tmp_path, monkeypatch)
    free, limited = Holdout(packed, 0.3), Holdout(packed, 0.3, most=40)
    assert free.tokens > 100 and 0 < limited.tokens <= 60
    (tmp_path / "one").mkdir()
    tiny = _corpus(tmp_path / "one", monkeypatch, [1])
    with pytest.raises(InputError, match="no document to learn from"):
        _sequences(Holdout(tiny, 0.5))


def test_a_stream_is_the_packed_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed corpus gives the tokens of the packed one, part by part, in the order of its seed; it keeps
    no more on the disk than it may, finds its place again without what it has passed, and notices changes."""
    packed = _corpus(tmp_path, monkeypatch, SIZES * 6)
    documents = find_documents([str(tmp_path / "text")])
    for name, value in (("LEAST_PART", 50), ("_MAPPED", 1)):
        monkeypatch.setattr(streaming, name, value)
    room = 4 * 4 * 120 * 2

    def stream() -> StreamedTokens:
        return StreamedTokens(documents, byte_tokenizer(), room, tmp_path / "cache")

    first = stream()
    assert sum(p.size for p in first.parts) == sum(packed.sizes)
    ids = np.concatenate([first.shard_tokens(i) for i in range(len(first.parts))])
    assert ids.tolist() == packed.tokens[:].tolist()
    kept = [p.stat().st_size for p in first.folder.glob("*.tokens")]
    assert 0 < sum(kept) <= room < 2 * len(ids)
    read = [_sequences(Holdout(first, 0.1, 100))[i]["input_ids"].tolist() for i in (0, 40, 170)]
    made = []
    monkeypatch.setattr(
        streaming,
        "write_part",
        lambda *a, write=streaming.write_part: made.append(a[1]) or write(*a),
    )
    again = stream()
    monkeypatch.setattr(again, "expect", lambda numbers: None)
    late = _sequences(Holdout(again, 0.1, 100))
    assert late[170]["input_ids"].tolist() == read[2]
    assert len(made) <= 2 * orders.POOL + 1
    assert [late[i]["input_ids"].tolist() for i in (0, 40)] == read[:2]
    with pytest.raises(InputError, match="too little to stream"):
        StreamedTokens(documents, byte_tokenizer(), 100, tmp_path / "cache")
    target = documents[0].path
    target.write_text("other")
    os.unlink(again.folder / "000000.tokens") if (again.folder / "000000.tokens").exists() else None
    again._mapped.clear()
    with pytest.raises(InputError, match="was changed while it was read"):
        again.shard_tokens(0)


def test_packed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is one row whose bounds are those of its sequences' documents."""
    training = _sequences(Holdout(_corpus(tmp_path, monkeypatch), 0.2))
    items = [training[i] for i in range(3)]
    row = collate_packed(items)
    assert row["input_ids"].shape == row["labels"].shape == (1, 48)
    starts = [b + 16 * i for i, item in enumerate(items) for b in item["bounds"][:-1].tolist()]
    assert row["cu_seqlens"].tolist() == [*starts, 48]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_order(ranks: int) -> None:
    """The batches that accelerate deals to any number of ranks are together the same steps, also after
    batches were skipped as on resuming."""
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

    size = 8 // ranks
    every = BatchSampler(SequentialSampler(range(80)), size, drop_last=False)
    shards = [BatchSamplerShard(every, ranks, rank) for rank in range(ranks)]
    steps = [sorted(chain(*batches)) for batches in zip(*shards, strict=True)]
    assert steps == [list(range(8 * i, 8 * i + 8)) for i in range(10)]
    late = [SkipBatchSampler(shard, skip_batches=6) for shard in shards]
    assert [sorted(chain(*batches)) for batches in zip(*late, strict=True)] == steps[6:]
