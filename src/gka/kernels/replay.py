"""A pass recorded once for every kind of call, and replayed on the tensors of the next.

The launches of a backend that `replays` take one structure each, of addresses and numbers. Between two calls
of a kind the addresses alone differ. A recording keeps the structures side by side in one block of memory,
and the place of every address in it. A replay allocates the results, and scratch in one piece, writes all
addresses at once and launches: the host does nothing else between two launches.
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
from gka.maths.chunked import Settings, Tokens

KINDS = 256  # recordings that are kept, the oldest dropped first
ALIGNMENT = 256  # bytes, of what lies in scratch

Slots = Sequence[Tensor | None]
INPUTS = ("q", "k", "v", "g", "gk", "alpha", "beta", "h0", "u0")  # the fields of Tokens.inputs


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
        launches: in their order; arguments are one ctypes structure with `tensors` (`arguments.fill`), or
            tensors and numbers for a function of torch.
        call: with its tables, which every call of the kind shares, and its scratch.
        given: inputs, each an object of its own, None where there is none.
        made: results.

    Raises:
        KeyError: an argument is none of these.
    """

    def __init__(
        self, launches: Sequence[Launch], call: GpuCall, given: Slots, made: Slots
    ) -> None:
        self.tables = tables = call.chunks.tables
        self.made = [None if x is None else (x.shape, x.dtype) for x in made]
        slots = (*given, *tables, *made)
        self.place: dict[int, tuple[int, int]] = {
            id(x): (slot, 0) for slot, x in enumerate(slots) if x is not None
        }
        self.size = 0
        for x in call.scratches:
            self.place[id(x)] = (len(slots), self.size)
            self.size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        self.device = next(x for x in slots if x is not None).device
        self.table_addresses = [x.data_ptr() for x in tables]
        self.lock = threading.Lock()  # two threads must not write the same block
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
                if x.numel() > 0:  # else null, as it is
                    patches.append(((begin + offset) // 8, *self.place[id(x)]))
            self.steps.append(_bound(launch, address))
            begin += size
        where, slot, offset = zip(*patches, strict=True)
        self.where, self.slot = np.array(where), np.array(slot)
        self.offset = np.array(offset, dtype=np.uint64)
        del self.place

    def _function(self, launch: Launch) -> Callable[[ctypes.c_void_p, list[Tensor | None]], None]:
        """A function of torch, called on the tensors of a replay."""
        wanted = [
            (self.place[id(x)], x.shape, x.dtype) if isinstance(x, Tensor) else x
            for x in launch.arguments
        ]

        def call(_: ctypes.c_void_p, tensors: list[Tensor | None]) -> None:
            found = [_found(x, tensors) if isinstance(x, tuple) else x for x in wanted]
            launch.kernel(launch.grid, *found)

        return call

    def replay(self, given: Slots) -> list[Tensor | None]:
        """Launches on these inputs, in the order of the recording's; returns the results."""
        made = [
            None if spec is None else torch.empty(spec[0], dtype=spec[1], device=self.device)
            for spec in self.made
        ]
        # float32, for tests that poison what is allocated
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
    """The one structure of a launch's arguments; None where they are others."""
    first = launch.arguments[0]
    return first if isinstance(first, ctypes.Structure) else None


def _bound(launch: Launch, address: int) -> Callable[[ctypes.c_void_p, list[Tensor | None]], None]:
    """The launch of a kernel whose arguments lie at that address."""
    kernel: Any = launch.kernel
    start, check, pointer = kernel.bind(launch.grid), kernel.check_launch, driver.Pointer(address)

    def call(stream: ctypes.c_void_p, _: list[Tensor | None]) -> None:
        error = start(stream, pointer, None)
        if error:
            check(error)

    return call


def _found(wanted: tuple, tensors: list[Tensor | None]) -> Tensor | None:
    """A tensor of a replay: whole, or a part of the scratch."""
    (slot, offset), shape, dtype = wanted
    x = tensors[slot]
    if slot < len(tensors) - 1 or x is None:
        return x
    count = math.prod(shape)
    return x.view(torch.uint8)[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


class Ran(NamedTuple):
    """A pass that ran: its call, what it was given, each an object of its own, and its results."""

    call: GpuCall
    given: Slots
    made: Slots


class Recordings:
    """The recordings of a pass by kind of call."""

    def __init__(self) -> None:
        self.held: dict[Hashable, Recording] = {}
        self.captured: set[Recording] = set()  # their tables are read by CUDA graphs

    def run(self, kind: Hashable, given: Slots, record: Callable[[Executor], Ran]) -> Slots:
        """The results of a pass on `given`: of a replay, or of `record`, whose launches are kept."""
        held, capturing = self.held.get(kind), torch.cuda.is_current_stream_capturing()
        if held is not None:
            if capturing:
                self.captured.add(held)
            return held.replay(given)
        recorder = Recorder()
        ran = record(recorder)
        if capturing:  # its tables may belong to the graph
            return ran.made
        while len(self.held) >= KINDS:
            self.held.pop(next(iter(self.held)), None)
        self.held[kind] = Recording(recorder.launches, *ran)
        return ran.made


def kind_of(passes: Passes, t: Tokens, settings: Settings, *more: Hashable) -> Hashable | None:
    """What the launches of a call depend on beside addresses; None where they cannot be replayed.

    Packed sequences have tables of their own every time.
    """
    if not passes.replays or t.cu_seqlens is not None or t.q.numel() == 0:
        return None
    there = tuple(x is None for x in t.inputs[3:])
    return passes, settings, t.q.shape, t.k.shape, t.v.shape, t.q.dtype, t.q.device, there, *more


def apart(t: Tokens) -> Tokens:
    """The same memory as tensors that are objects of their own: q may be k."""
    return t._replace(
        **{n: x.detach() for n, x in zip(INPUTS, t.inputs, strict=True) if x is not None}
    )
