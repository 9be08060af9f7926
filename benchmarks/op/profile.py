"""The profile of `python -m benchmarks.run op`: kernels of one training step of the op and of the layers.

profile.txt and op.json are written after each part; a part that fails is replaced by the reason.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch.profiler
from benchmarks import registry
from benchmarks.op.compare import Comparison
from benchmarks.registry import Build, Contender, Inputs, reason
from torch.profiler import ProfilerActivity

from gka.experiments.stopwatch import Call, Stopwatch
from gka.storage import write_text

FEW = 10  # solver steps of the shorter pass from which the loop's speed is measured
WARM_UP, CALLS = 3, 5
REGIONS = ("gka.", "ProfilerStep")  # regions, whose kernels are listed separately
MEMORY = {
    "kept_bytes": "kept for the backward pass, output included",
    "peak_bytes": "peak, inputs, gradients and a layer's weights included",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel (on a CPU, operator) in one call: microseconds of all its launches, and their number."""

    name: str
    us: float
    launches: float


def kernels(call: Call, watch: Stopwatch) -> list[Kernel]:
    """Kernels of a call, copies and fills included, longest first: means of CALLS calls after WARM_UP."""
    for _ in range(WARM_UP):
        watch.once(call)
    activities = [ProfilerActivity.CUDA] if watch.cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace:
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
    """Milliseconds and launches of all kernels."""
    return sum(kernel.us for kernel in found) / 1e3, sum(kernel.launches for kernel in found)


def table(found: list[Kernel]) -> str:
    """One line per kernel, and their sum, for one call."""
    ms, launches = total(found)
    lines = [f"{'us':>10} {'calls':>6} {'share':>6}  name"]
    for kernel in found:
        share = kernel.us / ms / 1e3
        lines.append(f"{kernel.us:10.1f} {kernel.launches:6g} {share:6.1%}  {kernel.name[:90]}")
    return "\n".join([*lines, f"{1e3 * ms:10.1f} {launches:6g} {'':6}  in all"])


def solve(found: list[Kernel]) -> Kernel:
    """The forward pass's kernel that contains the solver's loop.

    Raises:
        ValueError: there is no such kernel.
    """
    for kernel in found:
        if "gka_forward" in kernel.name or "solve_kernel" in kernel.name:
            return kernel
    raise ValueError("no kernel of the solve was found")


def loop_speed(
    few: list[Kernel], many: list[Kernel], flops: float, steps: int, peak: float | None
) -> str:
    """Speed of the solver's loop, as text, from the same pass with few and with many steps.

    Args:
        few, many: the kernels of both passes.
        flops: operations of one step for all tokens and heads.
        steps: number of additional steps of `many`.
        peak: TFLOP/s of the card, or None.
    """
    us = (solve(many).us - solve(few).us) / steps
    tera = flops / us / 1e6
    share = "" if peak is None else f", {tera / peak:.0%} of the card's peak"
    return f"the solve's loop: {us:.2f} us a step, {tera:.0f} TFLOP/s{share}"


def profile(bench: Comparison) -> None:
    """Profile the op at the first size, then the layers if they were measured."""
    size, peers = bench.options.sizes[0], "gated_delta_rule" in bench.options.peers
    op = registry.ours("chebyshev", bench.backend)
    texts = [part(bench, "op_profile", f"{size}", op.name, partial(of_op, bench, op))]
    layers = registry.profiled_layers(bench.backend, peers) if bench.options.layer else {}
    for name, build in layers.items():
        save(bench, texts)
        work = partial(of_layer, bench, name, build)
        texts.append(part(bench, "layer_profile", f"{bench.options.layer_size}", name, work))
    save(bench, texts)


def part(bench: Comparison, key: str, size: str, name: str, work: Callable[[dict], None]) -> str:
    """Let `work` fill an entry of the result's group `key`; returns the entry's text."""
    group = bench.found.setdefault(key, {"size": f"kernels of {size}", "contenders": {}})
    entry = group["contenders"][name] = {}
    try:
        work(entry)
    except Exception as error:
        entry |= {"status": "failed", "message": reason(error)}
        bench.say(f"kernels of {name}: {entry['message']}")
    bench.free()
    return f"one forward + backward of {name}, {size}\n{text_of(entry)}"


def save(bench: Comparison, texts: list[str]) -> None:
    write_text(bench.folder / "profile.txt", "\n".join(texts))
    bench.note()


def of_op(bench: Comparison, op: Contender, entry: dict) -> None:
    """Fill the op's entry at the first size."""
    size = bench.options.sizes[0]
    inputs = bench.inputs(size)
    held = [inputs.do, *(getattr(inputs, name) for name in op.leaves)]
    found, begun = bench.first(
        f"kernels of {op.name}, {size}",
        lambda: registry.passes(op.load(), inputs, op.leaves),
        lambda: sum(x.nbytes for x in held),
    )
    entry |= begun
    if not found:
        return
    entry |= sums(kernels(found["forward+backward"], bench.watch))
    if bench.watch.cuda:
        flops = float(size.batch * size.length * size.heads * registry.step_flops(size.dim))
        few, many = (forward_kernels(bench, inputs, steps) for steps in (FEW, registry.NUM_ITER))
        peak = bench.found["card"].get("matmul_tflops")
        more = registry.NUM_ITER - FEW
        entry["speeds"] = [loop_speed(few, many, flops, more, peak)]


def forward_kernels(bench: Comparison, inputs: Inputs, num_iter: int) -> list[Kernel]:
    op = registry.ours("chebyshev", bench.backend, num_iter)
    return kernels(registry.passes(op.load(), inputs, op.leaves)["forward"], bench.watch)


def of_layer(bench: Comparison, name: str, build: Build, entry: dict) -> None:
    """Fill a layer's entry."""
    size = bench.options.layer_size
    layer, found, begun = bench.first_layer(f"kernels of {name}, {size}", build)
    entry |= begun
    if layer is None or not found:
        return
    x = registry.hidden_states(size, bench.device).requires_grad_()
    entry["kept_bytes"] = bench.watch.kept_bytes(lambda: layer(x)[0])
    entry |= sums(kernels(found["forward+backward"], bench.watch))


def sums(found: list[Kernel]) -> dict:
    """The fields of an entry that describe kernels."""
    ms, launches = total(found)
    return {"kernels_ms": ms, "launches": launches, "kernels": [asdict(k) for k in found]}


def text_of(entry: dict) -> str:
    """An entry as text for profile.txt."""
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['message']}\n"
    lines = [table([Kernel(**k) for k in entry["kernels"]])]
    for key, words in MEMORY.items():
        if entry.get(key) is not None:
            lines.append(f"{entry[key] / 2**20:.0f} MiB {words}")
    return "\n".join([*lines, *entry.get("speeds", [])]) + "\n"
