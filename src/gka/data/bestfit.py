"""Best-fit decreasing: documents to sequences of one length, with little padding and no document cut.

Documents are taken longest first; each goes into the fullest sequence that still has room for it. Equal
lengths are interchangeable, so whole runs of them are placed at once: the time depends on the number of
different lengths, not on that of documents.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Which items share a sequence.

    Attributes:
        items: indices of the items, int64 [items]: those of the first pack, of the second, ...
        bounds: int64 [packs + 1]; pack p holds items[bounds[p] : bounds[p + 1]].
    """

    items: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.items[self.bounds[pack] : self.bounds[pack + 1]]


def best_fit(lengths: np.ndarray, room: int) -> Packs:
    """Packs of items with 1 to `room` tokens each; what is in a pack is in the order of the items.

    Args:
        lengths: int64 [items].
        room: tokens of a sequence.
    """
    order = np.argsort(-lengths, kind="stable")
    placed = np.empty(len(lengths), np.int64)
    sequences, at = _Sequences(room), 0
    for size, count in _by_length(lengths):
        placed[at : at + count] = sequences.place(size, count)
        at += count
    pack_of = np.empty(len(lengths), np.int64)
    pack_of[order] = placed
    items = np.argsort(pack_of, kind="stable")
    bounds = np.searchsorted(pack_of[items], np.arange(sequences.count + 1))
    return Packs(items, bounds)


def count_packs(lengths: np.ndarray, room: int) -> int:
    """The number of packs that `best_fit` makes, in less time."""
    sequences = _Sequences(room)
    for size, count in _by_length(lengths):
        sequences.place(size, count)
    return sequences.count


def _by_length(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """(length, number of items), longest first."""
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)[::-1]
    yield from zip(values.tolist(), counts[values].tolist(), strict=True)


class _Sequences:
    """Sequences by the room they have left."""

    def __init__(self, room: int) -> None:
        self.room, self.count = room, 0
        self.rooms: list[int] = []  # those that sequences have left, ascending
        self.by_room: dict[int, list[np.ndarray]] = {}

    def place(self, size: int, count: int) -> np.ndarray:
        """Numbers of the sequences that take `count` items of one size, int64 [count]."""
        found = []
        while count:
            where = bisect_left(self.rooms, size)
            taken = self._fill(where, size, count) if where < len(self.rooms) else None
            if taken is None:
                taken = self._open(size, count)
            found.append(taken)
            count -= len(taken)
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _fill(self, where: int, size: int, count: int) -> np.ndarray:
        """Fill sequences that have the same room, one after the other, until items or sequences end."""
        left = self.rooms[where]
        stack = self.by_room[left]
        numbers = stack.pop()
        if not stack:
            del self.by_room[left]
            self.rooms.pop(where)
        each = left // size
        used = min(len(numbers), -(-count // each))
        if used < len(numbers):
            self._keep(left, numbers[used:])
        return self._distribute(numbers[:used], left, size, min(count, used * each))

    def _open(self, size: int, count: int) -> np.ndarray:
        each = self.room // size
        numbers = np.arange(self.count, self.count - (-count // each))
        self.count += len(numbers)
        return self._distribute(numbers, self.room, size, count)

    def _distribute(self, numbers: np.ndarray, room: int, size: int, count: int) -> np.ndarray:
        """As many items as fit into each sequence; the last one takes the rest."""
        each = room // size
        last = count - (len(numbers) - 1) * each
        self._keep(room - each * size, numbers[:-1] if last < each else numbers)
        if last < each:
            self._keep(room - last * size, numbers[-1:])
        return np.repeat(numbers, each)[:count]

    def _keep(self, room: int, numbers: np.ndarray) -> None:
        if not room or not len(numbers):
            return
        if room not in self.by_room:
            insort(self.rooms, room)
            self.by_room[room] = []
        self.by_room[room].append(numbers)
