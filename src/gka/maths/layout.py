"""Sequences cut into chunks: every chunk of every sequence is one row of a batch of M chunks."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Which chunks belong to which sequence: sequence n owns chunks offsets[n] .. offsets[n+1] - 1.

    A sequence's last chunk is padded with zeros (zero key and value, log decay 0), which leave every
    state unchanged. An empty sequence owns no chunk.

    Attributes:
        chunk_size: C.
        batch: B of the token arrays (1 when packed).
        length: T of the token arrays.
        offsets: first chunk of each sequence, [N+1].
        slots: place of each packed token among the M*C places, int64 [T]; None when not packed.
    """

    chunk_size: int
    batch: int
    length: int
    offsets: tuple[int, ...]
    slots: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_chunks(self) -> int:
        """M, the chunks of all sequences."""
        return self.offsets[-1]

    @property
    def places(self) -> int:
        """T rounded up to whole chunks: the places of an unpacked sequence."""
        return -(-self.length // self.chunk_size) * self.chunk_size

    def cut(self, x: Tensor) -> Tensor:
        """[B,T,...] -> [M,C,...], zeros in the places past a sequence's end."""
        if self.slots is not None:
            out = x.new_zeros(self.num_chunks * self.chunk_size, *x.shape[2:])
            return out.index_copy_(0, self.slots, x[0]).unflatten(0, (-1, self.chunk_size))
        if self.places != self.length:
            padded = x.new_zeros(self.batch, self.places, *x.shape[2:])
            padded[:, : self.length] = x
            x = padded
        return x.reshape(self.num_chunks, self.chunk_size, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        """[M,C,...] -> [B,T,...], the inverse of `cut`."""
        if self.slots is not None:
            return x.flatten(0, 1).index_select(0, self.slots).unsqueeze(0)
        return x.reshape(self.batch, self.places, *x.shape[2:])[:, : self.length]

    @property
    def per_sequence(self) -> int:
        """Chunks of a sequence that is not packed."""
        return self.places // self.chunk_size

    def owners(self, device: torch.device) -> Tensor:
        """The sequence of each chunk, int64 [M]."""
        if self.slots is None:  # on the device: a copy from the host may make it wait
            return torch.arange(self.num_chunks, device=device) // max(self.per_sequence, 1)
        counts = torch.tensor(self.offsets, device="cpu").diff()
        places = torch.arange(self.num_sequences, device="cpu")
        owner = torch.repeat_interleave(places, counts, output_size=self.num_chunks)
        return owner.to(device, non_blocking=True)

    def sums(self, x: Tensor, owner: Tensor) -> Tensor:
        """Sums over each sequence of rows that belong to it, [R,...] -> [N,...].

        Args:
            x: a row a chunk, or as many for every sequence that is not packed.
            owner: the sequence of each row, int64 [R].
        """
        if self.slots is None and self.batch > 0:
            return x.unflatten(0, (self.batch, len(x) // self.batch)).sum(1)
        return x.new_zeros(self.num_sequences, *x.shape[1:]).index_add_(0, owner, x)

    def earlier(self, x: Tensor, owner: Tensor) -> Tensor:
        """Sums of x [M,H] over the earlier chunks of the same sequence; owner as `owners` has it."""
        if self.slots is None:
            heads_first = x.unflatten(0, (self.batch, self.per_sequence)).transpose(1, 2)
            return _before(heads_first).transpose(1, 2).flatten(0, 1)
        before = _before(x.T).T
        first = torch.tensor(self.offsets[:-1], device="cpu").to(x.device, non_blocking=True)
        first = first.clamp_max(max(self.num_chunks - 1, 0))
        return before - before[first][owner] if len(x) else before

    def steps(self, device: torch.device, reverse: bool = False) -> Iterator[tuple[Rows, Rows]]:
        """(sequences, their i-th chunks) for i = 0, 1, ...; from the last to the first if `reverse`.

        A sequence takes part in as many steps as it has chunks.
        """
        counts = [b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        order = range(max(counts, default=0))
        if self.slots is None:
            for i in reversed(order) if reverse else order:
                yield slice(None), slice(i, None, counts[0])
            return
        for i in reversed(order) if reverse else order:
            alive = [n for n, count in enumerate(counts) if count > i]
            rows = [self.offsets[n] + i for n in alive]
            # a blocking copy would make the host wait for the device
            both = torch.tensor([alive, rows], device="cpu").to(device, non_blocking=True)
            yield both[0], both[1]

    def blocks(self, chunks_per_block: int) -> Iterator[slice]:
        """Slices of the M chunks, at most `chunks_per_block` long."""
        for start in range(0, self.num_chunks, chunks_per_block):
            yield slice(start, min(start + chunks_per_block, self.num_chunks))


def _before(x: Tensor) -> Tensor:
    """Sums of what comes before, along the last dimension, where torch's scan is fast."""
    x = x.contiguous()
    return x.cumsum(-1) - x


def chunk_layout(
    batch: int,
    length: int,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> ChunkLayout:
    """The layout of B sequences of T tokens, or of packed sequences with the bounds cu_seqlens [N+1].

    With its CPU copy, cu_seqlens is not read, and the host does not wait for the device.
    """
    if cu_seqlens is None:
        per_sequence = -(-length // chunk_size)
        offsets = tuple(n * per_sequence for n in range(batch + 1))
        return ChunkLayout(chunk_size, batch, length, offsets)
    bounds = (cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist()
    offsets = [0]
    slots = []
    for begin, end in itertools.pairwise(bounds):
        slots.append(torch.arange(end - begin, device="cpu") + offsets[-1] * chunk_size)
        offsets.append(offsets[-1] + -(-(end - begin) // chunk_size))
    placed = torch.cat(slots).to(cu_seqlens.device, non_blocking=True)
    return ChunkLayout(chunk_size, batch, length, tuple(offsets), placed)
