"""Training and held-out parts of a corpus, by whole documents, chosen by a hash of their names.

The choice is the same on every machine, and however the corpus is read.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from gka.data.packed import PackedTokens, key_of
from gka.errors import InputError

ALL = 1 << 30
"""Tokens up to which held-out documents are chosen among all shards, if their number is limited."""
SPREAD = 64
"""Beyond that, they are chosen among shards that together have this many times as many tokens."""


class Shards(Protocol):
    """A corpus that is read shard by shard: `PackedTokens`, or `gka.data.streaming.StreamedTokens`."""

    spread: int | None
    """Shards that held-out documents come from; None: by their tokens, which are known."""
    window: int | None
    """Bytes of a window of `gka.data.order`, at least; None: the usual."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each shard's sources."""
        ...

    @property
    def checksum(self) -> str:
        """Differs if the corpus does."""
        ...

    def index(self, number: int) -> np.ndarray:
        """int64 [3, documents]: tokens, bytes and key of each document."""
        ...

    def shard_tokens(self, number: int) -> np.ndarray:
        """Ids [tokens]."""
        ...

    def expect(self, numbers: list[int]) -> None:
        """These shards will be read soon."""
        ...


@dataclass(frozen=True)
class Segments:
    """Documents, or parts of them, in one shard.

    Attributes:
        starts: first token of each, int64 [segments].
        lengths: tokens of each, int64 [segments].
    """

    starts: np.ndarray
    lengths: np.ndarray


class Holdout:
    """Which documents of a corpus are held out.

    Args:
        corpus: the corpus.
        eval_fraction: share of the tokens to hold out.
        most: tokens to hold out at most; 0: no limit.
    """

    def __init__(self, corpus: Shards, eval_fraction: float, most: int = 0) -> None:
        self.corpus = corpus
        self.shards = _candidates(corpus, eval_fraction, most)
        indices = [corpus.index(number) for number in self.shards]
        every = np.concatenate(indices, axis=1)
        total = int(every[0].sum())
        share = eval_fraction * total
        if len(self.shards) < len(corpus.sizes):  # the share is one of the whole corpus
            share *= sum(corpus.sizes) / max(1, sum(corpus.sizes[i] for i in self.shards))
        wanted = min(
            share, most or share, total / 2 if len(self.shards) < len(corpus.sizes) else share
        )
        self.cut: int | None = None
        chosen = np.zeros(every.shape[1], bool)
        if every.shape[1] == 1 and len(corpus.sizes) == 1:
            self.cut = total - max(1, round(wanted))
        else:
            chosen[_held_out(every[2].view(np.uint64), every[0], wanted)] = True
        ends = np.cumsum([index.shape[1] for index in indices])
        self.masks = dict(zip(self.shards, np.split(chosen, ends[:-1]), strict=True))
        self._count(every, chosen)

    def _count(self, every: np.ndarray, chosen: np.ndarray) -> None:
        """Tokens and UTF-8 bytes that are held out."""
        if self.cut is None:
            self.tokens, self.bytes = int(every[0][chosen].sum()), float(every[1][chosen].sum())
        else:
            total = int(every[0].sum())
            self.tokens = total - self.cut
            self.bytes = float(every[1].sum()) * self.tokens / total

    def training(self, number: int) -> Segments:
        """The documents of a shard to train on."""
        return self._segments(number, held=False)

    def evaluation(self, number: int) -> Segments:
        """The held-out documents of a shard."""
        return self._segments(number, held=True)

    def _segments(self, number: int, held: bool) -> Segments:
        lengths = np.asarray(self.corpus.index(number)[0])
        starts = np.cumsum(lengths) - lengths
        if self.cut is not None:
            start, stop = (self.cut, int(lengths.sum())) if held else (0, self.cut)
            return Segments(np.asarray([start]), np.asarray([stop - start]))
        mask = self.masks.get(number)
        if mask is None:
            mask = np.zeros(len(lengths), bool)
        kept = mask if held else ~mask
        return Segments(starts[kept], lengths[kept])


def _candidates(corpus: Shards, eval_fraction: float, most: int) -> list[int]:
    """Shards that held-out documents are chosen from, ascending."""
    sizes = corpus.sizes
    order = sorted(range(len(sizes)), key=lambda number: key_of(str(number)))
    if corpus.spread is not None:
        return sorted(order[: corpus.spread])
    shards = getattr(corpus, "shards", [])
    counts = [shard.tokens for shard in shards]
    if not most or sum(counts) <= ALL:
        return list(range(len(sizes)))
    wanted = SPREAD * min(most, eval_fraction * sum(counts))
    enough = np.searchsorted(np.cumsum([counts[i] for i in order]), wanted) + 1
    return sorted(order[: int(enough)])


def _held_out(keys: np.ndarray, counts: np.ndarray, wanted: float) -> list[int]:
    """Indices of the documents to evaluate on; at least one, never all.

    A document that is too long for `wanted` tokens is skipped; if all are, the shortest is held out.
    """
    held, chosen = 0, []
    for i in np.argsort(keys, kind="stable").tolist():
        if held >= wanted:
            break
        if held + counts[i] <= 1.5 * wanted:
            chosen.append(i)
            held += int(counts[i])
    return chosen[: len(counts) - 1] or [int(counts.argmin())]


@dataclass(frozen=True)
class Split:
    """Part of a packed corpus.

    Attributes:
        packed: the corpus.
        ranges: token ranges [start, stop) in reading order, int64 [ranges, 2].
        bytes: UTF-8 bytes of their text.
    """

    packed: PackedTokens
    ranges: np.ndarray
    bytes: float

    @cached_property
    def tokens(self) -> int:
        """Number of tokens in the ranges."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())


def split(packed: PackedTokens, eval_fraction: float) -> tuple[Split, Split]:
    """Split a corpus into training and evaluation parts, by whole documents.

    Documents are held out in the order of a hash of their names until about `eval_fraction` of the tokens is
    reached, so the choice is the same on every machine. A document that is too long for that is skipped; if
    all are, the shortest is held out. If there is only one document, its end is held out, and bytes are
    counted in proportion to tokens.
    """
    holdout = Holdout(packed, eval_fraction)
    offsets = np.cumsum([0, *(shard.tokens for shard in packed.shards)])
    ranges = []
    for part in (holdout.training, holdout.evaluation):
        found = [part(number) for number in range(len(packed.shards))]
        starts = np.concatenate([s.starts + o for s, o in zip(found, offsets, strict=False)])
        ranges.append(np.stack([starts, starts + np.concatenate([s.lengths for s in found])], 1))
    train = float(packed.bytes.sum()) - holdout.bytes
    return Split(packed, ranges[0], train), Split(packed, ranges[1], holdout.bytes)


class TokenBlocks(Dataset):
    """Consecutive blocks of `length` tokens of a split; a last part that does not fill a block is dropped.

    Each item is {"input_ids", "labels"}, int64 [length]. Both are the same ids, because models shift labels.
    """

    def __init__(self, part: Split, length: int) -> None:
        self.part, self.length = part, length
        self._ends = np.cumsum(part.ranges[:, 1] - part.ranges[:, 0])

    def __len__(self) -> int:
        return self.part.tokens // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        ids = torch.from_numpy(self._read(index * self.length).astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def _read(self, start: int) -> np.ndarray:
        """`length` tokens from position `start` of the concatenated ranges."""
        pieces, missing = [], self.length
        row = int(np.searchsorted(self._ends, start, side="right"))
        while missing:
            low, high = self.part.ranges[row]
            begin = max(low, high - (self._ends[row] - start))
            pieces.append(self.part.packed.tokens[begin : min(high, begin + missing)])
            missing -= len(pieces[-1])
            start += len(pieces[-1])
            row += 1
        return np.concatenate(pieces)


def token_blocks(
    packed: PackedTokens, length: int, eval_fraction: float
) -> tuple[TokenBlocks, TokenBlocks]:
    """Training and evaluation blocks of `length` tokens.

    Raises:
        InputError: one of the parts is shorter than a block.
    """
    parts = split(packed, eval_fraction)
    for name, part in zip(("training", "evaluation"), parts, strict=True):
        check_tokens(name, part.tokens, length)
    return TokenBlocks(parts[0], length), TokenBlocks(parts[1], length)


def check_tokens(name: str, tokens: int, length: int) -> None:
    """Raise `InputError` if a part of a corpus is shorter than a block."""
    if tokens < length:
        raise InputError(
            f"the {name} part of the corpus has {tokens} tokens, fewer than sequence_length = {length}; give "
            "more text, a shorter sequence_length or another eval_fraction"
        )
