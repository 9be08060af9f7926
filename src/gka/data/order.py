"""The order of training sequences: a function of the seed and of a position, and of nothing else.

Position i of a run has the same sequence whatever the number of processes, of batches and of loaders, and
whether the run was interrupted before it. So nothing about the data needs to be saved: a checkpoint's step
is the place in the data.

A corpus is cut into windows of consecutive shards. Documents are packed within a window. An epoch takes the
windows in a random order, `POOL` of them at a time, and the sequences of a pool in a random order.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

WINDOW = 128 << 20
"""Bytes of sources in a window, at least."""
WINDOWS = 256
"""Windows of a corpus at most: a run that is resumed late counts the sequences of those before."""
SEQUENCES = 512
"""Sequences in a window, at least: with fewer, more of them end in padding."""
POOL = 4
"""Windows whose sequences are mixed."""
_BYTES_PER_TOKEN = 4

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hashed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014), element-wise, uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
        x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
        return x ^ (x >> np.uint64(31))


def permutation(count: int, *seeds: int) -> np.ndarray:
    """A random order of 0..count-1, int64 [count]; the same on every machine and with every NumPy."""
    key = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for seed in seeds:
            key = hashed(key + np.uint64(seed) + _GOLDEN)
        numbers = key + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return np.argsort(hashed(numbers), kind="stable")


def windows_of(sizes: Sequence[int], length: int, least: int | None = None) -> list[range]:
    """Windows of consecutive shards.

    Args:
        sizes: bytes of each shard's sources.
        length: tokens of a sequence.
        least: bytes of a window (None: from the constants of this module).
    """
    if least is None:
        least = max(WINDOW, sum(sizes) // WINDOWS, SEQUENCES * length * _BYTES_PER_TOKEN)
    windows, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= least:
            windows.append(range(start, number + 1))
            start, held = number + 1, 0
    if start < len(sizes):
        if windows and held < least // 2:  # a small rest joins the last window
            windows[-1] = range(windows[-1].start, len(sizes))
        else:
            windows.append(range(start, len(sizes)))
    return windows


class Order:
    """(window, sequence in it) of each position in the endless succession of a corpus's epochs.

    Args:
        windows: number of windows.
        count: number of sequences of a window; called when it is needed first.
        seed: of the order.
        expect: told the windows of the pool that comes next, when a pool begins.
    """

    def __init__(
        self,
        windows: int,
        count: Callable[[int], int],
        seed: int,
        expect: Callable[[list[int]], None] = lambda _: None,
    ) -> None:
        self.windows, self.seed, self._count, self.expect = windows, seed, count, expect
        self._counts: dict[int, int] = {}
        self._epoch = _Epoch(0, self._windows_of(0))
        self._pool: _Pool | None = None

    def count(self, window: int) -> int:
        """Number of sequences of a window."""
        if window not in self._counts:
            self._counts[window] = self._count(window)
        return self._counts[window]

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Window and sequence at a position, 0 or more.

        Raises:
            ValueError: the corpus has no sequence.
        """
        epoch = 0
        if len(self._counts) == self.windows:
            epoch, position = divmod(position, self._length())
        first = self._find(epoch, position)
        if first is None:  # all windows are counted now, and the position is behind the first epoch
            skipped, position = divmod(position, self._length())
            epoch += skipped
            first = self._find(epoch, position)
        assert first is not None
        return self._opened(epoch, first).at(position - self._epoch.starts[first // POOL])

    def _length(self) -> int:
        length = sum(self.count(window) for window in range(self.windows))
        if not length:
            raise ValueError("a corpus without sequences has no order")
        return length

    def _windows_of(self, epoch: int) -> list[int]:
        return permutation(self.windows, self.seed, epoch).tolist()

    def _find(self, epoch: int, position: int) -> int | None:
        """The first window, in the epoch's order, of the pool that holds a position; None if none does."""
        if self._epoch.number != epoch:
            self._epoch = _Epoch(epoch, self._windows_of(epoch))
        order, starts = self._epoch.order, self._epoch.starts
        while starts[-1] <= position and (first := (len(starts) - 1) * POOL) < self.windows:
            pool = order[first : first + POOL]
            starts.append(starts[-1] + sum(self.count(window) for window in pool))
        if starts[-1] <= position:
            return None
        return (bisect_right(starts, position) - 1) * POOL

    def _opened(self, epoch: int, first: int) -> "_Pool":
        """The pool that begins with a window; the one before is forgotten."""
        if self._pool is None or (self._pool.epoch, self._pool.first) != (epoch, first):
            order = self._epoch.order
            windows = order[first : first + POOL]
            counts = [self.count(window) for window in windows]
            shuffled = permutation(sum(counts), self.seed, epoch, first)
            self._pool = _Pool(epoch, first, windows, shuffled, np.cumsum([0, *counts]))
            following = order[first + POOL : first + 2 * POOL]
            self.expect(following or self._windows_of(epoch + 1)[:POOL])
        return self._pool


@dataclass
class _Epoch:
    """Order of the windows in an epoch, and the position at which each pool begins, as far as known."""

    number: int
    order: list[int]
    starts: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class _Pool:
    """Some windows of an epoch, and the order of their sequences."""

    epoch: int
    first: int
    windows: list[int]
    shuffled: np.ndarray
    bounds: np.ndarray

    def at(self, position: int) -> tuple[int, int]:
        place = int(self.shuffled[position])
        which = int(np.searchsorted(self.bounds, place, side="right")) - 1
        return self.windows[which], place - int(self.bounds[which])


class Mixture:
    """Which of several corpora each position takes, and how many positions of that corpus precede it.

    Position i takes the corpus whose share of [0, 1) holds the fractional part of i / golden ratio: after any
    number n of positions, each corpus has its weight times n of them but for a term that grows like log n.

    Args:
        weights: of the corpora, above 0, with sum 1.
    """

    BLOCK = 1 << 16

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = tuple(weights)
        bounds = np.cumsum(weights)[:-1]
        self._bounds = np.asarray(
            [min(int(bound * 2.0**64), 2**64 - 1) for bound in bounds.tolist()], np.uint64
        )
        self._before = [
            np.zeros(len(weights), np.int64)
        ]  # positions of each corpus before each block
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(corpus, position in it)."""
        if len(self.weights) == 1:
            return 0, position
        number, place = divmod(position, self.BLOCK)
        while len(self._before) <= number:
            chosen = self._chosen(len(self._before) - 1)
            counts = np.bincount(chosen, minlength=len(self.weights))
            self._before.append(self._before[-1] + counts)
        if self._kept is None or self._kept[0] != number:
            chosen = self._chosen(number)
            ranks = np.empty(self.BLOCK, np.int64)
            for corpus in range(len(self.weights)):
                here = chosen == corpus
                ranks[here] = np.arange(int(here.sum())) + self._before[number][corpus]
            self._kept = number, chosen, ranks
        return int(self._kept[1][place]), int(self._kept[2][place])

    def _chosen(self, block: int) -> np.ndarray:
        """Corpus of each position of a block, int64 [BLOCK]."""
        first = block * self.BLOCK
        with np.errstate(over="ignore"):
            points = np.arange(first, first + self.BLOCK, dtype=np.uint64) * _GOLDEN
        return np.searchsorted(self._bounds, points, side="right")
