"""Which blocks each rank trains on and evaluates: the same global batches on any number of ranks.

A run is one sequence of places 0, 1, 2, ...; the data are shuffled anew for each pass over them, and step s
takes the places s G to (s + 1) G - 1 of a global batch of G blocks. Micro-batches are dealt to the readers
(`gka.parallel.mesh.Layout`) in turn.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from gka.models.loss import IGNORE_INDEX, next_token_targets


class ShuffledOrder:
    """The block at each place of a run.

    Args:
        blocks: in one pass over the data.
        seed: of the shuffles; pass number e is shuffled with seed + e.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        self._pass, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, place: int) -> int:
        number, inside = divmod(place, self.blocks)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed + number)
            self._pass, self._order = number, torch.randperm(self.blocks, generator=generator)
        return int(self._order[inside])


class GivenOrder:
    """For data whose sequence number i is what a run reads at place i."""

    def __getitem__(self, place: int) -> int:
        return place


class TrainingBatches(Sampler[list[int]]):
    """The micro-batches of one reader, as indices of blocks.

    Args:
        order: the block at each place.
        batch_size: blocks of a micro-batch.
        count: micro-batches of a reader in the whole run.
        readers, reader: how many ranks or groups of ranks read different blocks, and which of them reads
            these.
    """

    def __init__(
        self,
        order: ShuffledOrder | GivenOrder,
        batch_size: int,
        count: int,
        readers: int = 1,
        reader: int = 0,
    ) -> None:
        self.order, self.batch_size, self.count = order, batch_size, count
        self.readers, self.reader = readers, reader

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.count):
            start = (number * self.readers + self.reader) * self.batch_size
            yield [self.order[start + i] for i in range(self.batch_size)]


class EvaluationBatches(Sampler[list[int]]):
    """All blocks in order, dealt to the readers; every reader gets as many batches.

    A reader for whom none is left gets the last batch again, which `counts` says not to count.

    Args:
        blocks: to evaluate.
        batch_size: blocks of a batch; the last one may have fewer.
        readers, reader: as in `TrainingBatches`.
    """

    def __init__(self, blocks: int, batch_size: int, readers: int = 1, reader: int = 0) -> None:
        self.blocks, self.batch_size = blocks, batch_size
        self.readers, self.reader = readers, reader
        self.batches = -(-blocks // batch_size)

    def __len__(self) -> int:
        return -(-self.batches // self.readers)

    def number(self, turn: int) -> int:
        """Which of all batches this reader evaluates in its turn; `batches` or more: none, a repetition."""
        return turn * self.readers + self.reader

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            start = min(self.number(turn), self.batches - 1) * self.batch_size
            yield list(range(start, min(start + self.batch_size, self.blocks)))


def targets_of(inputs: dict[str, Any]) -> int:
    """Tokens that a batch's labels ask a model to predict; its rows if it has no labels."""
    if "labels" not in inputs:
        return len(next(iter(inputs.values())))
    targets = next_token_targets(inputs["labels"], inputs.get("cu_seqlens"))
    return int((targets != IGNORE_INDEX).sum())
