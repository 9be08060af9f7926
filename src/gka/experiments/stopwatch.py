"""Times of calls, interleaved so that all of them have the same conditions, and their memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

Call = Callable[[], object]
ROUNDS, WARM_UP = 5, 3
CACHE_BYTES = 256 << 20  # several times the second-level cache
HEAD_START = 20_000_000  # cycles, about 10 ms, for which the device waits while the host launches
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Times:
    """Milliseconds of every repeat: on the device, by round; and on the host, to launch the call."""

    device: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def as_json(self) -> dict:
        repeats = [x for part in self.device for x in part]
        return {
            "ms": self.device, "median": statistics.median(repeats), "min": min(repeats),
            "max": max(repeats), "host_ms": statistics.median(self.host) if self.host else None,
        }  # fmt: skip


class Stopwatch:
    """Times on one device: on a GPU by CUDA events, with the cache emptied before each call."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        size = CACHE_BYTES if self.cuda else 1
        self.cache = torch.empty(size, dtype=torch.int8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, call: Call) -> float:
        """Seconds of one call, with a wait for the device."""
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin

    def repeat(
        self, call: Call, repeats: int, head_start: int = HEAD_START
    ) -> tuple[list[float], list[float]]:
        """Milliseconds of consecutive calls, on the device and on the host, without waiting between them.

        The host gets a head start of so many cycles, as in the training of many layers, so that the device
        never waits for it and both times are separate.
        """
        if not self.cuda:
            return [1e3 * self.once(call) for _ in range(repeats)], []
        host, events = [], []
        self.wait()
        torch.cuda._sleep(head_start)
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cache.zero_()
            begin = time.perf_counter()
            start.record()
            call()
            end.record()
            host.append(1e3 * (time.perf_counter() - begin))
            events.append((start, end))
        self.wait()
        return [start.elapsed_time(end) for start, end in events], host

    def interleaved(self, calls: dict[str, Call], seconds: float) -> dict[str, Times]:
        """Times of calls that are already warm, about `seconds` each, in ROUNDS rounds of all calls."""
        times = {name: Times() for name in calls}
        repeats = {}
        for name, call in calls.items():
            estimate = min(self.once(call) for _ in range(WARM_UP))
            repeats[name] = max(1, min(40, int(seconds / ROUNDS / max(estimate, 1e-6))))
        for _ in range(ROUNDS):
            for name, call in calls.items():
                device, host = self.repeat(call, repeats[name])
                times[name].device.append(device)
                times[name].host += host
        return times

    def peak_bytes(self, call: Call) -> int | None:
        """Peak bytes of device memory during the call, above those allocated before; None on a CPU."""
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def kept_bytes(self, call: Call) -> int | None:
        """Bytes of device memory that the call's result keeps, saved tensors included; None on a CPU."""
        if not self.cuda:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        result = call()
        self.wait()
        kept = torch.cuda.memory_allocated() - before
        del result  # only now: it keeps the memory that was measured
        return kept


def ratios(times: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[float]:
    """Ratio of the medians of each round, whose calls ran at nearly the same time."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(times, base, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, minimum, maximum."""
    return statistics.median(values), min(values), max(values)


def captured(call: Call, cuda: bool) -> Call:
    """The call as a CUDA graph, recorded after one plain run; on a CPU the call itself."""
    if not cuda:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return partial(replay, graph, call)


def replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """Run `graph`; the reference to `call` keeps alive the tensors that it reads and writes."""
    graph.replay()


def peak_added(work: Call) -> float | None:
    """MiB by which the resident size rises at its peak while `work` runs; None if it cannot be measured.

    Linux keeps a process's peak resident size (VmHWM), and resets it to the present size when "5" is
    written to /proc/self/clear_refs. The reset is needed because the import of torch alone can have a
    higher peak than the work. Other systems, and containers that forbid the reset, give None. Before, freed
    memory is returned to the system as far as the allocator allows, so that its reuse counts too.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
        before = _highest_kib()
    except OSError:
        return None
    work()
    return (_highest_kib() - before) / 1024


def _highest_kib() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no VmHWM")
