"""Which kernels a call runs, how often and for how long."""

from dataclasses import dataclass

from benchmarks.stopwatch import Call, Stopwatch
from torch.profiler import ProfilerActivity, profile

WARM_UP, CALLS = 3, 5
REGIONS = ("gka.", "ProfilerStep")  # which contain kernels that are listed themselves


@dataclass(frozen=True)
class Kernel:
    """Of one call: microseconds of all launches together, and their number. On a CPU, operators."""

    name: str
    us: float
    launches: float


def kernels(call: Call, watch: Stopwatch) -> list[Kernel]:
    """Mean of CALLS calls after WARM_UP others, the longest first; copies and fills count as kernels."""
    for _ in range(WARM_UP):
        watch.once(call)
    activities = [ProfilerActivity.CUDA] if watch.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        for _ in range(CALLS):
            call()
        watch.wait()
    found = []
    for event in trace.key_averages():
        us = event.self_device_time_total if watch.cuda else event.self_cpu_time_total
        if us > 0 and not event.key.startswith(REGIONS):
            found.append(Kernel(event.key, us / CALLS, event.count / CALLS))
    return sorted(found, key=lambda kernel: -kernel.us)


def total(found: list[Kernel]) -> tuple[float, float]:
    """Milliseconds and launches of all."""
    return sum(kernel.us for kernel in found) / 1e3, sum(kernel.launches for kernel in found)


def table(found: list[Kernel]) -> str:
    """A line a kernel, and their sum; all of one call."""
    ms, launches = total(found)
    lines = [f"{'us':>10} {'calls':>6} {'share':>6}  name"]
    for kernel in found:
        share = kernel.us / ms / 1e3
        lines.append(f"{kernel.us:10.1f} {kernel.launches:6g} {share:6.1%}  {kernel.name[:90]}")
    return "\n".join([*lines, f"{1e3 * ms:10.1f} {launches:6g} {'':6}  in all"])


def solve(found: list[Kernel]) -> Kernel:
    """The forward pass's kernel that holds the solve's loop.

    Raises:
        ValueError: there is none.
    """
    for kernel in found:
        if "gka_forward" in kernel.name or "solve_kernel" in kernel.name:
            return kernel
    raise ValueError("no kernel of the solve was found")


def loop_speed(
    few: list[Kernel], many: list[Kernel], flops: float, steps: int, peak: float | None
) -> str:
    """What the solve's loop alone reaches, from the same pass with few steps and with many.

    Args:
        flops: of one step of all.
        steps: how many more the second takes.
        peak: TFLOP/s of the card, if known.
    """
    us = (solve(many).us - solve(few).us) / steps
    tera = flops / us / 1e6
    share = "" if peak is None else f", {tera / peak:.0%} of the card's peak"
    return f"the solve's loop: {us:.2f} us a step, {tera:.0f} TFLOP/s{share}"
