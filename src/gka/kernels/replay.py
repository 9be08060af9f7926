"""Record a pass once per kind of call, and replay it on the tensors of later calls.

With a backend that `replays`, each launch takes one structure of addresses and numbers, and two calls of a
kind differ only in the addresses. A recording keeps the structures in one block of memory, and the place of
every address in it. A replay allocates the results, and the scratch in one piece, writes all addresses at
once, and launches: the host does nothing between two launches.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gka.kernels import driver
from gka.kernels.call import GpuCall
from gka.kernels.passes import Executor, Launch, Passes, execute
from gka.kernels.tables import Chunking
from gka.maths.chunked import Settings, Tokens

KINDS = 256  # recordings kept at most; the oldest is dropped first
ALIGNMENT = 256  # bytes, of each array in the scratch

Slots = Sequence[Tensor | None]


class Recorder:
    """An executor that keeps the launches."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, launches: Iterable[Launch]) -> None:
        launches = list(launches)
        self.launches += launches
        execute(launches)


class Recording:
    """The launches of one kind of call.

    Args:
        launches: in order; arguments are one ctypes structure with `tensors` (`arguments.fill`), or
            tensors and numbers for a torch function.
        call: the recorded call. Calls of its kind share its tables, unless sequences are packed; each replay
            allocates its scratch.
        given: inputs, each a distinct object; None for an absent one.
        made: results.

    Raises:
        KeyError: an argument is not a tensor of the call, its inputs or its results.
    """

    def __init__(
        self, launches: Sequence[Launch], call: GpuCall, given: Slots, made: Slots
    ) -> None:
        self.tables = tables = () if call.t.cu_seqlens is not None else call.chunks.tables
        self.made = [None if x is None else (x.shape, x.dtype) for x in made]
        slots = (*given, *tables, *made)
        self.place: dict[int, tuple[int, int]] = {
            id(x): (slot, 0) for slot, x in enumerate(slots) if x is not None
        }
        self.size = 0
        for x in call.scratches:
            self.place[id(x)] = (len(slots), self.size)
            self.size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        for part, whole, offset in call.views:
            slot, first = self.place[id(whole)]
            self.place[id(part)] = (slot, first + offset)
        self.device = next(x for x in slots if x is not None).device
        self.table_addresses = [x.data_ptr() for x in tables]
        self.lock = threading.Lock()  # two threads must not write to the block at once
        self._lay_out(launches)

    def _lay_out(self, launches: Sequence[Launch]) -> None:
        structures = [_structure(launch) for launch in launches]
        sizes = [0 if x is None else -(-ctypes.sizeof(x) // 16) * 16 for x in structures]
        self.block = np.zeros(sum(sizes) // 8, dtype=np.uint64)
        patches: list[tuple[int, int, int]] = []
        self.steps: list[Callable[[ctypes.c_void_p, list[Tensor | None]], None]] = []
        begin = 0
        for launch, structure, size in zip(launches, structures, sizes, strict=True):
            if structure is None:
                self.steps.append(self._function(launch))
                continue
            address = self.block.ctypes.data + begin
            ctypes.memmove(address, ctypes.addressof(structure), ctypes.sizeof(structure))
            for offset, x in structure.tensors.items():
                if x.numel() > 0:  # an empty tensor's address stays null
                    patches.append(((begin + offset) // 8, *self.place[id(x)]))
            self.steps.append(_bound(launch, address))
            begin += size
        where, slot, offset = zip(*patches, strict=True)
        self.where, self.slot = np.array(where), np.array(slot)
        self.offset = np.array(offset, dtype=np.uint64)
        del self.place

    def _function(self, launch: Launch) -> Callable[[ctypes.c_void_p, list[Tensor | None]], None]:
        """The launch of a torch function, called on the tensors of a replay."""
        wanted = [
            (self.place[id(x)], x.shape, x.dtype) if isinstance(x, Tensor) else x
            for x in launch.arguments
        ]

        # not the launch, which holds the recorded tensors
        kernel, grid = launch.kernel, launch.grid

        def call(_: ctypes.c_void_p, tensors: list[Tensor | None]) -> None:
            found = [_found(x, tensors) if isinstance(x, tuple) else x for x in wanted]
            kernel(grid, *found)

        return call

    def replay(self, given: Slots) -> list[Tensor | None]:
        """Launch on these inputs, ordered as in the recording; returns the results."""
        made = [
            None if spec is None else torch.empty(spec[0], dtype=spec[1], device=self.device)
            for spec in self.made
        ]
        # float32, so that tests can poison what is allocated
        scratch = torch.empty(self.size // 4, dtype=torch.float32, device=self.device)
        addresses = [0 if x is None else x.data_ptr() for x in given]
        addresses += self.table_addresses
        addresses += [0 if x is None else x.data_ptr() for x in made]
        addresses.append(scratch.data_ptr())
        filled = np.array(addresses, dtype=np.uint64)[self.slot]
        filled += self.offset
        tensors, stream = [*given, *self.tables, *made, scratch], driver.current_stream()
        with self.lock:
            self.block[self.where] = filled
            for step in self.steps:
                step(stream, tensors)
        return made


def _structure(launch: Launch) -> Any:
    """The structure that is a launch's only argument; None for other arguments."""
    first = launch.arguments[0]
    return first if isinstance(first, ctypes.Structure) else None


def _bound(launch: Launch, address: int) -> Callable[[ctypes.c_void_p, list[Tensor | None]], None]:
    """The launch of a kernel whose argument lies at that address."""
    kernel: Any = launch.kernel
    start, check, pointer = kernel.bind(launch.grid), kernel.check_launch, driver.Pointer(address)

    def call(stream: ctypes.c_void_p, _: list[Tensor | None]) -> None:
        error = start(stream, pointer, None)
        if error:
            check(error)

    return call


def _found(wanted: tuple, tensors: list[Tensor | None]) -> Tensor | None:
    """A tensor of a replay, or a part of its scratch."""
    (slot, offset), shape, dtype = wanted
    x = tensors[slot]
    if slot < len(tensors) - 1 or x is None:
        return x
    count = math.prod(shape)
    return x.view(torch.uint8)[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


class Ran(NamedTuple):
    """A pass that ran: its call, its inputs (distinct objects) and its results."""

    call: GpuCall
    given: Slots
    made: Slots


class Recordings:
    """The recordings of a pass by kind of call."""

    def __init__(self) -> None:
        self.held: dict[Hashable, Recording] = {}
        self.captured: set[Recording] = set()  # CUDA graphs read their tables

    def run(self, kind: Hashable, given: Slots, record: Callable[[Executor], Ran]) -> Sequence[Any]:
        """The results of a pass on `given`, from a replay or from `record`, whose launches are then kept."""
        held, capturing = self.held.get(kind), torch.cuda.is_current_stream_capturing()
        if held is not None:
            if capturing:
                self.captured.add(held)
            return held.replay(given)
        recorder = Recorder()
        ran = record(recorder)
        if capturing:  # not kept, because its tables may belong to the graph
            return ran.made
        while len(self.held) >= KINDS:
            self.held.pop(next(iter(self.held)), None)
        self.held[kind] = Recording(recorder.launches, *ran)
        return ran.made


def kind_of(
    passes: Passes, t: Tokens, settings: Settings, chunks: Chunking | None, *more: Hashable
) -> Hashable | None:
    """What a call's launches depend on besides addresses; None if they cannot be replayed.

    Args:
        chunks: the tables of packed sequences, which are inputs then; None for sequences of one length.
    """
    if not passes.replays or t.q.numel() == 0:
        return None
    there = tuple(x is None for x in t.inputs[3:])
    cut = None if chunks is None else chunks.sizes
    shapes = (t.q.shape, t.k.shape, t.v.shape)
    return passes, settings, shapes, t.q.dtype, t.q.device, there, cut, *more


def apart(t: Tokens) -> Tokens:
    """The same memory as distinct tensor objects, for a caller may pass one tensor as q and k."""
    return Tokens._make((*(None if x is None else x.detach() for x in t.inputs), *t.bounds))
