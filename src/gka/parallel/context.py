"""Context parallelism: one batch's tokens split over the ranks of a group, on torch.distributed."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gka.errors import InputError
from gka.layers.parts.masks import positions_of, token_mask

# torch 2.13 renamed them
ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_TO_ALL: Any = dist.all_to_all_single
Bounds = tuple[Tensor | None, Tensor | None]
CHUNK_SIZE = 64  # of the ops; ranges end at its multiples
Ranges = Sequence[tuple[int, int]]


def even_ranges(length: int, ranks: int, chunk_size: int = CHUNK_SIZE) -> list[tuple[int, int]]:
    """Ranges of whole chunks that cover `length` tokens, one a rank, as even as chunks allow.

    Raises:
        InputError: there are fewer chunks than ranks.
    """
    chunks = -(-length // chunk_size)
    if ranks < 1 or chunks < ranks:
        raise InputError(
            f"{length} tokens are {chunks} chunks of {chunk_size}, too few for {ranks} ranks: each needs "
            "one. Take fewer ranks, or longer sequences."
        )
    bounds = [min(length, chunks * rank // ranks * chunk_size) for rank in range(ranks + 1)]
    return list(itertools.pairwise(bounds))


class ContextParallel:
    """One batch's tokens split over a group of ranks: the `context` of ops, layers and models.

    Build one for every batch, on every rank alike, from facts about whole rows; it communicates nothing.
    Ops then take this rank's tokens (`shard`) and `context=`.

    Args:
        group: a process group, a one-dimensional DeviceMesh, or None for all processes.
        token_ranges: (begin, end) of each rank in every row, in order and without gaps; all but the last
            end at a multiple of `chunk_size`. They may differ in length. `even_ranges` makes even ones.
        cu_seqlens: bounds [N+1] of documents packed into rows of B = 1, over the whole row. A document may
            lie on several ranks. Empty ones are left out.
        attention_mask: [B, length] of whole rows, 1 for tokens and 0 for padding, which may stand at a row's
            ends. Not with cu_seqlens.
        chunk_size: tokens of a chunk of the ops.
        device: of the tokens. None: the current CUDA device with NCCL, else the CPU.

    Attributes:
        rank, ranks, ranges, begin, end, length, origins, firsts, cu_seqlens, cu_seqlens_cpu, documents,
            attention_mask: as in `gka.ops.context.SequenceContext`.

    Raises:
        InputError: ranges, bounds, mask and group do not fit; the message says which.
    """

    def __init__(
        self,
        group: Any,
        token_ranges: Ranges,
        cu_seqlens: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        chunk_size: int = CHUNK_SIZE,
        device: torch.device | str | None = None,
    ) -> None:
        self.group = _process_group(group)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ranges = [(int(begin), int(end)) for begin, end in token_ranges]
        check_ranges(self.ranges, self.ranks, chunk_size)
        self.device = _device(device, self.group)
        self.begin, self.end = self.ranges[self.rank]
        self.length = self.ranges[-1][1]
        if cu_seqlens is not None and attention_mask is not None:
            raise InputError(
                "cu_seqlens and attention_mask exclude each other: packed documents have no padding."
            )
        self._find_documents(None if cu_seqlens is None else _bounds(cu_seqlens, self.length))
        mask = None if attention_mask is None else _mask(attention_mask, self.length)
        self.attention_mask = None if mask is None else mask.to(self.device)
        self._positions: Tensor | None = None
        self._wider: dict[int, Bounds] = {}

    def _find_documents(self, bounds: list[int] | None) -> None:
        """Where the documents of every rank's first token begin, and which parts this rank holds."""
        self.documents: tuple[int, ...] = ()
        self.cu_seqlens = self.cu_seqlens_cpu = None
        if bounds is None:
            self.origins = self.firsts = (0,) * self.ranks
            return
        spans = list(enumerate(itertools.pairwise(bounds)))
        self.firsts = tuple(
            next(a for _, (a, b) in spans if a <= begin < b) for begin, _ in self.ranges
        )
        self.origins = tuple(
            next(rank for rank, (begin, end) in enumerate(self.ranges) if begin <= a < end)
            for a in self.firsts
        )
        mine = [(n, a, b) for n, (a, b) in spans if a < self.end and b > self.begin and a < b]
        self.documents = tuple(n for n, _, _ in mine)
        local = [0, *(min(b, self.end) - self.begin for _, _, b in mine)]
        self.cu_seqlens_cpu = torch.tensor(local, dtype=torch.int64, device="cpu")
        self.cu_seqlens = self.cu_seqlens_cpu.to(self.device, non_blocking=True)

    @classmethod
    def even(cls, group: Any, length: int, **options: Any) -> "ContextParallel":
        """A context of `even_ranges` over rows of `length` tokens; options as in the constructor."""
        ranks = dist.get_world_size(_process_group(group))
        chunk_size = options.get("chunk_size", CHUNK_SIZE)
        return cls(group, even_ranges(length, ranks, chunk_size), **options)

    def shard(self, x: Tensor) -> Tensor:
        """This rank's tokens of whole rows, [B, length, ...] -> [B, end - begin, ...].

        Raises:
            InputError: rows have another length.
        """
        if x.dim() < 2 or x.shape[1] != self.length:
            raise InputError(
                f"shard takes whole rows [batch, {self.length}, ...]; got {tuple(x.shape)}."
            )
        return x[:, self.begin : self.end]

    @property
    def positions(self) -> Tensor:
        """Places of this rank's tokens in their document, padding not counted, [B or 1, end - begin]."""
        if self._positions is None:
            before, length = self.begin - self.firsts[self.rank], self.end - self.begin
            bounds, mask = self.bounds(before)[0], self.attention_mask
            mask = None if mask is None else mask[:, : self.end]
            self._positions = positions_of(length, before, mask, bounds, self.device)
        return self._positions

    def bounds(self, halo: int) -> Bounds:
        """cu_seqlens and its CPU copy, of this rank's tokens behind `halo` of its first document's."""
        if halo == 0 or self.cu_seqlens_cpu is None:
            return self.cu_seqlens, self.cu_seqlens_cpu
        if halo not in self._wider:
            wider = self.cu_seqlens_cpu + halo
            wider[0] = 0
            self._wider[halo] = wider.to(self.device, non_blocking=True), wider
        return self._wider[halo]

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, [...] -> [ranks, ...]; one all-gather."""
        x = x.contiguous()
        out = x.new_empty(self.ranks * x.numel())
        ALL_GATHER(out, x.view(-1), group=self.group)
        return out.view(self.ranks, *x.shape)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of x[rank], [ranks, ...] -> [...]; one reduce-scatter."""
        x = x.contiguous()
        out = x.new_empty(x[0].numel())
        REDUCE_SCATTER(out, x.view(-1), group=self.group)
        return out.view(x.shape[1:])

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send sent[r] numbers of x [n] to each rank r, in order; those received, received[r] from each r."""
        out, size = x.new_empty(sum(received)), x.element_size()
        # as bytes, which every backend moves whatever the dtype
        ALL_TO_ALL(
            out.view(torch.uint8), x.contiguous().view(torch.uint8),
            [n * size for n in received], [n * size for n in sent], group=self.group,
        )  # fmt: skip
        return out


def _process_group(group: Any) -> Any:
    """The process group of a group, a one-dimensional mesh, or None."""
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "context parallelism needs torch.distributed: start with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise InputError(
                f"group must be a mesh of one dimension, such as mesh['cp']; got {group.ndim} of them."
            )
        return group.get_group()
    if group is not None and dist.get_rank(group) < 0:
        raise InputError(
            "this process is no member of the group: build its context on members only."
        )
    return group


def _device(device: torch.device | str | None, group: Any) -> torch.device:
    if device is not None:
        return torch.device(device)
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_ranges(ranges: list[tuple[int, int]], ranks: int, chunk_size: int) -> None:
    """Check that there is one range of whole chunks a rank, and that they follow each other from 0.

    Raises:
        InputError: it is not so; the message names the rank.
    """
    if len(ranges) != ranks:
        raise InputError(
            f"token_ranges must have one (begin, end) for each of the group's {ranks} ranks; "
            f"got {len(ranges)}."
        )
    at = 0
    for rank, (begin, end) in enumerate(ranges):
        if begin != at or end <= begin:
            raise InputError(
                f"token_ranges must follow each other from 0 without gaps, none empty; rank {rank} has "
                f"({begin}, {end}) after {at}."
            )
        if end % chunk_size and rank < ranks - 1:
            raise InputError(
                f"token_ranges must end at multiples of a chunk, {chunk_size} tokens (solvers choose their "
                f"steps by chunk); rank {rank} ends at {end}."
            )
        at = end


def _bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise InputError(
            f"cu_seqlens must be [documents + 1] integers over the whole row; got {cu_seqlens.dtype} of "
            f"shape {tuple(cu_seqlens.shape)}."
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise InputError(
            f"cu_seqlens must rise from 0 to the row's {length} tokens, those of all ranks; got {bounds}."
        )
    return bounds


def _mask(attention_mask: Tensor, length: int) -> Tensor | None:
    """The mask of tokens as bool; None if there is no padding."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        raise InputError(
            f"attention_mask must be [batch, {length}] of 0 and 1 over whole rows; got shape "
            f"{tuple(attention_mask.shape)}."
        )
    mask = token_mask(attention_mask).bool()
    if mask.all():
        return None
    if (mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).max() > 1:
        raise InputError(
            "attention_mask has padding between a row's tokens; a sequence that is split over ranks may have "
            "it at its ends only. Move it there, or pack the parts as documents with cu_seqlens."
        )
    return mask
