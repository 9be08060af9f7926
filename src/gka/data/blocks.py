"""Blocks of packed tokens to train on, and the documents held out to evaluate on."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from gka.data.packed import PackedTokens
from gka.errors import InputError


@dataclass(frozen=True)
class Split:
    """Part of a packed corpus.

    Attributes:
        packed: the corpus.
        ranges: token ranges [start, stop) in the order in which they are read, int64 [ranges, 2].
        bytes: bytes of text in them.
    """

    packed: PackedTokens
    ranges: np.ndarray
    bytes: float

    @property
    def tokens(self) -> int:
        """Number of tokens in the ranges."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())


def split(packed: PackedTokens, eval_fraction: float) -> tuple[Split, Split]:
    """Train and evaluation parts of a corpus, by whole documents.

    Documents are held out in the order of a hash of their names until about `eval_fraction` of the
    tokens is reached: the choice is the same on every machine. A document too long for that is passed
    over; if all are, the shortest is held out. Of a corpus of one document the last part is held out,
    its bytes counted in proportion.
    """
    counts = np.diff(packed.boundaries)
    if len(counts) == 1:
        return _cut(packed, eval_fraction)
    chosen = np.zeros(len(counts), bool)
    chosen[_held_out(packed, eval_fraction)] = True
    ranges = np.stack([packed.boundaries[:-1], packed.boundaries[1:]], axis=1)
    train, evaluation = (
        Split(packed, ranges[part], float(packed.bytes[part].sum())) for part in (~chosen, chosen)
    )
    return train, evaluation


def _held_out(packed: PackedTokens, eval_fraction: float) -> list[int]:
    """Indices of the documents to evaluate on; at least one, never all."""
    counts = np.diff(packed.boundaries)
    wanted, held, chosen = eval_fraction * float(counts.sum()), 0, []
    names = [document["name"] for document in packed.description["documents"]]
    for i in sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest()):
        if held < wanted and held + counts[i] <= 1.5 * wanted:
            chosen.append(i)
            held += counts[i]
    return chosen[: len(counts) - 1] or [int(counts.argmin())]


class TokenBlocks(Dataset):
    """Blocks of `length` tokens of a split, one after another; what does not fill a block is left.

    Each item is {"input_ids", "labels"}, int64 [length], the same ids: models shift labels themselves.
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
        """`length` tokens from position `start` of the ranges laid end to end."""
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
    """Training and evaluation blocks.

    Raises:
        InputError: if either part is shorter than one block.
    """
    parts = split(packed, eval_fraction)
    for name, part in zip(("training", "evaluation"), parts, strict=True):
        if part.tokens < length:
            raise InputError(
                f"the {name} part of the corpus has {part.tokens} tokens, fewer than "
                f"sequence_length = {length}; give more text, a shorter sequence_length or another "
                "eval_fraction"
            )
    return TokenBlocks(parts[0], length), TokenBlocks(parts[1], length)


def _cut(packed: PackedTokens, eval_fraction: float) -> tuple[Split, Split]:
    total, size = int(packed.boundaries[-1]), float(packed.bytes.sum())
    cut = total - max(1, round(eval_fraction * total))
    parts = ((0, cut), (cut, total))
    train, evaluation = (
        Split(packed, np.asarray([part]), size * (part[1] - part[0]) / total) for part in parts
    )
    return train, evaluation
