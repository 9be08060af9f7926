"""Training and held-out sequences of one or several corpora, with documents apart or in one running stream.

Apart: documents are packed by best fit and see themselves only (`cu_seqlens`). A document longer than a
sequence is cut into pieces of the sequence's length and a rest; each piece starts anew, like a document.
The first token of a document or piece is not predicted. A rest of one token predicts nothing and is left out.
Running: documents follow one another, and sequences are cut from them at equal distances. States,
convolutions and attention run on over the ends of documents.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from gka.data.bestfit import Packs, best_fit, count_packs
from gka.data.order import POOL, Mixture, Order, windows_of
from gka.data.splits import Holdout, Segments, Shards, check_tokens
from gka.data.weights import check_weights
from gka.errors import InputError

IGNORED = -100
ENDLESS = 1 << 50
"""Length of a data set that has no end."""
Item = dict[str, torch.Tensor]


class TrainingSequences(Dataset):
    """Sequences of `length` tokens in the order of `gka.data.order`, without end; item i is the run's i-th.

    Each item is {"input_ids", "labels"}, int64 [length], and if documents are apart "bounds": 0, the end of
    each document, and of the padding if there is any. Labels are -100 where nothing is to be predicted.

    Args:
        parts: the corpora without their held-out documents.
        weights: share of each corpus in the sequences.
        length: tokens of a sequence.
        apart: whether documents are apart.
        pad: id of the padding.
        seed: of the order.

    Raises:
        InputError: weights are not above 0, their sum is not 1 or their number another than that of corpora,
            or a corpus has no sequence.
    """

    ordered = True
    """Items are to be taken in their order."""

    def __init__(
        self,
        parts: Sequence[Holdout],
        weights: Sequence[float],
        length: int,
        *,
        apart: bool,
        pad: int,
        seed: int,
    ) -> None:
        check_weights(weights, len(parts))
        self.length, self.apart, self.pad = length, apart, pad
        self.mixture = Mixture(weights)
        self.corpora = [
            _Corpus(part, length, apart, seed + (number << 32)) for number, part in enumerate(parts)
        ]
        for corpus in self.corpora:
            corpus.check()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Item:
        if index < 0:
            raise IndexError(f"sequence {index}: the first is 0")
        which, position = self.mixture[index]
        return _item(self.corpora[which][position], self.length, self.apart, self.pad)

    @property
    def collate(self) -> Any:
        """Function of a list of items to a batch."""
        return collate_packed if self.apart else default_collate

    def padding(self) -> float:
        """Share of padding in the sequences that are packed so far; 0 if documents run on."""
        if not self.apart:
            return 0.0
        plans = [plan for corpus in self.corpora for plan in corpus.plans.values()]
        room = self.length * sum(len(plan) for plan in plans)
        return 1 - sum(plan.tokens for plan in plans) / room if room else 0.0


class HeldOutSequences(Dataset):
    """All held-out documents as sequences of `length` tokens; items as in `TrainingSequences`.

    Args:
        parts: the corpora with their held-out documents.
        length: tokens of a sequence.
        apart: whether documents are apart; otherwise a last part that fills no sequence is dropped.
        pad: id of the padding.

    Attributes:
        tokens, bytes: of the held-out documents.
    """

    def __init__(self, parts: Sequence[Holdout], length: int, *, apart: bool, pad: int) -> None:
        self.length, self.apart, self.pad = length, apart, pad
        self.tokens, self.bytes = sum(p.tokens for p in parts), sum(p.bytes for p in parts)
        if not apart:
            for part in parts:
                check_tokens("evaluation", part.tokens, length)
        self.plans = [
            _Plan(p.corpus, [(i, p.evaluation(i)) for i in p.shards], length, apart) for p in parts
        ]
        self._ends = np.cumsum([len(plan) for plan in self.plans])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        plan = self.plans[which]
        return _item(
            plan[index - int(self._ends[which]) + len(plan)], self.length, self.apart, self.pad
        )

    @property
    def collate(self) -> Any:
        """Function of a list of items to a batch."""
        return collate_packed if self.apart else default_collate


def collate_packed(items: Sequence[Item]) -> Item:
    """Pack all sequences into one row: `input_ids` and `labels` [1,T], `cu_seqlens` [N+1], all int64."""
    row = {name: torch.cat([i[name] for i in items])[None] for name in ("input_ids", "labels")}
    length = len(items[0]["input_ids"])
    bounds = [item["bounds"][1:] + number * length for number, item in enumerate(items)]
    return row | {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), *bounds])}


class _Corpus:
    """The training part of one corpus: the documents (arrays of ids) of each position's sequence."""

    def __init__(self, part: Holdout, length: int, apart: bool, seed: int) -> None:
        self.part, self.length, self.apart = part, length, apart
        corpus = part.corpus
        self.windows = windows_of(corpus.sizes, length, corpus.window)
        self.order = Order(len(self.windows), self._count, seed, self._expect)
        self.plans: OrderedDict[int, _Plan] = OrderedDict()

    def check(self) -> None:
        """Raise `InputError` if there is no sequence."""
        try:
            self.order[0]
        except ValueError:
            tokens = sum(plan.tokens for plan in self.plans.values())
            if not self.apart:
                check_tokens("training", tokens, self.length)
            raise InputError(
                "the training part of the corpus has no document to learn from"
            ) from None

    def __getitem__(self, position: int) -> list[np.ndarray]:
        window, sequence = self.order[position]
        return self._plan(window)[sequence]

    def _count(self, window: int) -> int:
        if window in self.plans:
            return len(self.plans[window])
        if len(self.windows) <= POOL:
            return len(self._plan(window))
        return _count(self._documents(window), self.length, self.apart)

    def _documents(self, window: int) -> list[tuple[int, Segments]]:
        return [(shard, self.part.training(shard)) for shard in self.windows[window]]

    def _plan(self, window: int) -> "_Plan":
        if window not in self.plans:
            documents = self._documents(window)
            self.plans[window] = _Plan(self.part.corpus, documents, self.length, self.apart)
            while len(self.plans) > POOL:
                self.plans.popitem(last=False)
        return self.plans[window]

    def _expect(self, windows: list[int]) -> None:
        self.part.corpus.expect([shard for window in windows for shard in self.windows[window]])


class _Plan:
    """The sequences of some documents: which tokens of which shard each of them holds.

    Args:
        corpus: where the ids are.
        documents: those of each shard.
        length: tokens of a sequence.
        apart: whether documents are apart.
    """

    def __init__(
        self, corpus: Shards, documents: list[tuple[int, Segments]], length: int, apart: bool
    ) -> None:
        self.corpus, self.length = corpus, length
        counts = [len(segments.starts) for _, segments in documents]
        shards = np.repeat([shard for shard, _ in documents], counts)
        starts = np.concatenate([segments.starts for _, segments in documents])
        lengths = np.concatenate([segments.lengths for _, segments in documents])
        self.packs: Packs | None = None
        if apart:
            owner, starts, lengths = _cut(starts, lengths, length)
            shards = shards[owner]
            self.packs = best_fit(lengths, length)
        self.shards, self.starts, self.lengths = shards, starts, lengths
        self._ends = np.cumsum(lengths)
        self.tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self.packs) if self.packs is not None else self.tokens // self.length

    def __getitem__(self, sequence: int) -> list[np.ndarray]:
        """The ids of each document of a sequence; of a running stream, of its pieces."""
        if self.packs is not None:
            items = self.packs[sequence].tolist()
            return [self._ids(i, 0, int(self.lengths[i])) for i in items]
        at, stop = sequence * self.length, (sequence + 1) * self.length
        pieces, item = [], int(np.searchsorted(self._ends, at, side="right"))
        while at < stop:
            end = int(self._ends[item])
            begin = end - int(self.lengths[item])
            pieces.append(self._ids(item, at - begin, min(stop, end) - begin))
            at, item = end, item + 1
        return pieces

    def _ids(self, item: int, start: int, stop: int) -> np.ndarray:
        first = int(self.starts[item])
        return self.corpus.shard_tokens(int(self.shards[item]))[first + start : first + stop]


def _cut(
    starts: np.ndarray, lengths: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most `length` tokens, without those of one token: (document, start, tokens) of each."""
    counts = -(-lengths // length)
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(lengths[owner] - number * length, length)
    kept = sizes > 1
    return owner[kept], (starts[owner] + number * length)[kept], sizes[kept]


def _count(documents: list[tuple[int, Segments]], length: int, apart: bool) -> int:
    """Number of sequences of a plan of these documents."""
    lengths = np.concatenate([segments.lengths for _, segments in documents])
    if not apart:
        return int(lengths.sum()) // length
    rests = lengths % length  # pieces of the full length have a sequence each
    return int((lengths // length).sum()) + count_packs(rests[rests > 1], length)


def _item(pieces: list[np.ndarray], length: int, apart: bool, pad: int) -> Item:
    ids = np.full(length, pad, np.int64)
    joined = np.concatenate(pieces)
    ids[: len(joined)] = joined
    labels = ids.copy()
    labels[len(joined) :] = IGNORED
    labels[0] = IGNORED
    item = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if not apart:
        return item
    bounds = np.cumsum([0, *(len(piece) for piece in pieces)])
    labels[bounds[1:-1]] = IGNORED  # no token of a document comes before its first
    if len(joined) < length:
        bounds = np.append(bounds, length)
    return item | {"bounds": torch.from_numpy(bounds)}
