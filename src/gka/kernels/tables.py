"""Tables on the device of where sequences, chunks and segments lie among the tokens."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gka.maths.chunked import Tokens

SCAN_PROGRAMS = 396  # programs that scans should have, about: 3 per multiprocessor on 132
KEPT = 64  # tables kept for different calls
SHORTEST_SEGMENT = 6  # chunks; shorter segments cost more to combine than they gain
# Programs that suffice where more of them would cut segments below so many chunks: 10 % of a forward and
# backward pass at (8, 2048, 8) on an H100.
ENOUGH_PROGRAMS, LONG_SEGMENT = 192, 11


@dataclass(frozen=True)
class Chunking:
    """Sequences, their chunks, and the segments of consecutive chunks that scans process in parallel.

    Every sequence has at least one segment; that of an empty sequence is empty.

    Attributes:
        start, length: first token (int64) and number of tokens (int32) of each chunk [M].
        bounds: first token of each sequence, int64 [N+1].
        segments: int32 [S, 5]: sequence, first and end chunk, first and end segment of the sequence.
        segmented: whether any sequence has more than one segment.
        whole: whether all chunks have the same number of tokens.
    """

    start: Tensor
    length: Tensor
    bounds: Tensor
    segments: Tensor
    segmented: bool
    whole: bool

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.start, self.length, self.bounds, self.segments

    @property
    def sizes(self) -> tuple[int, int, int, bool, bool]:
        """What launches depend on besides the tables' addresses."""
        counts = (self.num_chunks, self.num_sequences, self.num_segments)
        return *counts, self.segmented, self.whole

    @cached_property
    def num_chunks(self) -> int:
        return len(self.start)

    @cached_property
    def num_sequences(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def num_segments(self) -> int:
        return len(self.segments)


_ELSEWHERE = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gka-tables")
_HELD: dict[tuple, "Chunking"] = {}
_CAPTURED: dict[tuple, "Chunking"] = {}  # never dropped, because CUDA graphs read them


def segment_length(num_chunks: int, programs_per_segment: int) -> int:
    """Chunks per segment: as many segments as fill the chip, none shorter than SHORTEST_SEGMENT."""

    def shortest(programs: int) -> int:
        return -(-num_chunks // max(1, programs // programs_per_segment))

    enough = min(shortest(ENOUGH_PROGRAMS), LONG_SEGMENT)
    return max(SHORTEST_SEGMENT, shortest(SCAN_PROGRAMS), enough)


def chunking(tokens: Tokens, size: int, programs_per_segment: int) -> Chunking:
    """The tables of a call in chunks of `size`, for scans with that many programs per segment."""
    batch, length = tokens.q.shape[:2]
    device = tokens.q.device
    if tokens.cu_seqlens is not None:
        bounds = getattr(tokens, "cu_seqlens_cpu", None)
        bounds = tokens.cu_seqlens.cpu() if bounds is None else bounds
        return _shared(bounds.long(), size, programs_per_segment, device)
    count = -(-length // size)  # chunks of a sequence
    stretch = segment_length(batch * count, programs_per_segment)
    pieces = max(1, -(-count // stretch))
    return _of_batch(
        batch, length, size, max(1, -(-count // pieces)), device
    )  # about equal segments


def _of_batch(batch: int, length: int, size: int, stretch: int, device: torch.device) -> Chunking:
    """Tables of sequences of one length. They are kept, ready for every stream and CUDA graph."""
    if device.type != "cuda":
        return _made(batch, length, size, stretch, device)
    kind = (batch, length, size, stretch, device)
    capturing = torch.cuda.is_current_stream_capturing()
    held = _HELD.get(kind)
    if held is None:
        if capturing:  # each replay of the graph computes them again, in the graph's own memory
            return _made(batch, length, size, stretch, device)
        # on another thread: this one may allocate from the memory pool of a CUDA graph it warms up
        held = _ELSEWHERE.submit(_ready, batch, length, size, stretch, device).result()
        _keep(kind, held)
    if capturing:
        _CAPTURED[kind] = held
    return held


def _ready(batch: int, length: int, size: int, stretch: int, device: torch.device) -> Chunking:
    """Tables whose computation is finished, so that no stream need wait."""
    with torch.cuda.device(device):
        made = _made(batch, length, size, stretch, device)
        torch.cuda.current_stream(device).synchronize()
    return made


def _made(batch: int, length: int, size: int, stretch: int, device: torch.device) -> Chunking:
    """Tables computed on the device, without a copy from the host."""
    count = -(-length // size)  # chunks of a sequence; below, its segments
    pieces = max(1, -(-count // stretch))
    chunk = torch.arange(batch * count, device=device)
    sequence, within = chunk // max(count, 1), chunk % max(count, 1) * size
    segment = torch.arange(batch * pieces, device=device)
    of, first = segment // pieces, segment % pieces * stretch
    columns = (
        of,
        of * count + first,
        of * count + (first + stretch).clamp(max=count),
        of * pieces,
        (of + 1) * pieces,
    )
    return Chunking(
        start=sequence * length + within,
        length=(length - within).clamp(max=size).int(),
        bounds=torch.arange(batch + 1, device=device) * length,
        segments=torch.stack(columns, 1).int(),
        segmented=pieces > 1,
        whole=length % size == 0,
    )


def _keep(kind: tuple, made: Chunking) -> None:
    while len(_HELD) >= KEPT:
        _HELD.pop(next(iter(_HELD)), None)
    _HELD[kind] = made


def _shared(bounds: Tensor, size: int, programs_per_segment: int, device: torch.device) -> Chunking:
    """`_of_packed`, made once for calls of equal bounds on a stream: a model's layers, in both passes."""
    given = (bounds, size, programs_per_segment, device)
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return _of_packed(*given)
    stream = torch.cuda.current_stream(device) if on_gpu else None
    kind = (bounds.numpy().tobytes(), *given[1:], stream)
    held = _HELD.get(kind)
    if held is None:
        # on another thread, as in `_of_batch`
        held = (
            _of_packed(*given) if stream is None else _ELSEWHERE.submit(_on, stream, given).result()
        )
        _keep(kind, held)
    return held


def _on(stream: torch.cuda.Stream, given: tuple) -> Chunking:
    with torch.cuda.stream(stream):
        return _of_packed(*given)


def _of_packed(
    bounds: Tensor, size: int, programs_per_segment: int, device: torch.device
) -> Chunking:
    """Tables of packed sequences; `bounds` [N+1] is on the CPU."""
    lengths = bounds.diff()
    counts = (lengths + size - 1) // size
    first = _starts(counts)
    stretch = segment_length(int(first[-1]), programs_per_segment)
    pieces = ((counts + stretch - 1) // stretch).clamp(min=1)
    first_piece = _starts(pieces)
    sequence = torch.repeat_interleave(_places(counts), counts)
    within = (_places(sequence) - first[sequence]) * size
    of = torch.repeat_interleave(_places(counts), pieces)
    begin = first[of] + (_places(of) - first_piece[of]) * stretch
    end = torch.minimum(begin + stretch, first[of + 1])
    columns = (of, begin, end, first_piece[of], first_piece[of + 1])
    return Chunking(
        start=_to(bounds[sequence] + within, device),
        length=_to((lengths[sequence] - within).clamp(max=size).int(), device),
        bounds=_to(bounds, device),
        segments=_to(torch.stack(columns, 1).int(), device),
        segmented=bool((pieces > 1).any()),
        whole=bool((lengths % size == 0).all()),
    )


def _places(like: Tensor) -> Tensor:
    """0, 1, ... on the CPU, independent of torch.set_default_device."""
    return torch.arange(len(like), device="cpu")


def _starts(counts: Tensor) -> Tensor:
    """Cumulative sums that start at zero, [N] -> [N+1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _to(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
