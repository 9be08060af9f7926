"""Which kernels a call runs, and for how long."""

from benchmarks.stopwatch import Call, Stopwatch
from torch.profiler import ProfilerActivity, profile


def profile_kernels(call: Call, watch: Stopwatch, loop_flops: float, peak: float | None) -> str:
    """A table of kernels by total time; for each solve kernel the share of the card's peak in its loop.

    Args:
        call: what is profiled, warm after three runs.
        watch: of its device.
        loop_flops: of the loop of one solve.
        peak: TFLOP/s of the card, if known.
    """
    for _ in range(3):
        watch.once(call)
    activities = [ProfilerActivity.CUDA] if watch.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        call()
        watch.wait()
    events = [
        (event.self_device_time_total if watch.cuda else event.self_cpu_time_total, event)
        for event in trace.key_averages()
    ]
    regions = ("gka.", "ProfilerStep")  # which contain kernels that are listed themselves
    kernels = [(us, e) for us, e in events if us > 0 and not e.key.startswith(regions)]
    events = sorted(kernels, key=lambda pair: -pair[0])
    total = sum(us for us, _ in events)
    lines = [f"{'us':>10} {'calls':>6} {'share':>6}  name"]
    for us, event in events:
        lines.append(f"{us:10.1f} {event.count:6d} {us / total:6.1%}  {event.key[:90]}")
    lines.append(f"{total:10.1f} {'':6} {'':6}  in all")
    for us, event in events:
        if "solve" in event.key and watch.cuda:
            tera = loop_flops * event.count / us / 1e6
            share = "" if peak is None else f", {tera / peak:.0%} of the card's peak"
            lines.append(f"{event.key[:60]}: {tera:.0f} TFLOP/s counting its loop alone{share}")
    return "\n".join(lines)
