"""How much of a step's time collectives take, by torch.profiler."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]
SHOWN, NAME = 20, 80  # kernels that are told, and letters of their names
COLLECTIVES = ("ncclDevKernel", "ncclKernel")
REGIONS = ("nccl:", "FSDP::", "gka.", "ProfilerStep")  # of kernels, which are listed themselves


def shares(step: Callable[[], Any], wait: Callable[[], None], cuda: bool) -> dict[str, Any]:
    """Of one step's time on the device, the part in which NCCL's kernels run, and run alone.

    A collective's kernel also waits for the slowest rank. "busy_ms": milliseconds in which other kernels run;
    "kernels": those of the longest, summed by name. Without a GPU the step runs untraced, and all are None.
    """
    if not cuda:
        step()
        return {"nccl_share": None, "nccl_alone": None, "busy_ms": None, "kernels": None}
    wait()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        wait()
    spans, others, sums = [], [], Counter[str]()
    for event in trace.events() or []:
        if event.device_type == DeviceType.CUDA and not event.name.startswith(REGIONS):
            span = event.time_range.start, event.time_range.end
            (spans if event.name.startswith(COLLECTIVES) else others).append(span)
            sums[event.name[:NAME]] += (span[1] - span[0]) / 1e3
    longest = {name: round(ms, 3) for name, ms in sums.most_common(SHOWN)}
    return {**fractions(spans, others), "busy_ms": covered(others) / 1e3, "kernels": longest}


def fractions(collectives: list[Span], others: list[Span]) -> dict[str, float]:
    """The two shares, from when collectives and other kernels ran."""
    every = [*collectives, *others]
    if not every:
        return {"nccl_share": 0.0, "nccl_alone": 0.0}
    whole = max(end for _, end in every) - min(begin for begin, _ in every)
    alone = covered(every) - covered(others)
    return {"nccl_share": covered(collectives) / whole, "nccl_alone": alone / whole}


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
