"""The chunk-wise form against the token-by-token reference on this CPU: `python -m benchmarks.cpu`.

Time of forward + backward by length, their ratio measured in one process with the two interleaved,
and peak memory, each in a fresh process. Writes cpu.json and cpu.png, prints a table.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from gka.ops import chunk_gka

HEADS, DIM = 2, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BOTH = (256, 512, 2048)  # lengths at which the reference is run too, which is slow
BACKENDS = {"chunk-wise": "torch", "token by token": "reference"}


def inputs(length: int) -> list[Tensor]:
    """float32 leaves q, k, v, g, alpha of one sequence."""
    torch.manual_seed(0)
    q, k, v = (normalize(torch.randn(1, length, HEADS, DIM), dim=-1) for _ in range(3))
    gates = -0.1 * torch.rand(1, length, HEADS), torch.rand(1, length, HEADS)
    return [x.requires_grad_() for x in (q, k, v, *gates)]


def forward_backward(leaves: list[Tensor], form: str) -> float:
    """Seconds of one forward and backward pass."""
    q, k, v, g, alpha = leaves
    begin = time.perf_counter()
    o, _ = chunk_gka(q, k, v, g, g, alpha, backend=BACKENDS[form])
    torch.autograd.grad(o.sum(), leaves)
    return time.perf_counter() - begin


def peak_memory(length: int, form: str) -> float:
    """MiB that forward + backward adds to the largest resident size of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--peak", form, str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(form: str, length: int) -> None:
    """The body of `peak_memory`'s process."""
    forward_backward(inputs(64), form)  # what is loaded on first use does not count
    leaves = inputs(length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(leaves, form)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure(repeats: int, console: Console) -> list[dict]:
    """One row for each length: seconds of every repeat, MiB, ratio of medians."""
    rows = []
    for length in track(LENGTHS, "measuring", console=console):
        leaves = inputs(length)
        forms = [form for form in BACKENDS if form == "chunk-wise" or length in BOTH]
        times: dict[str, list[float]] = {form: [] for form in forms}
        forward_backward(leaves, "chunk-wise")
        for _ in range(repeats):
            for form in forms:
                times[form].append(forward_backward(leaves, form))
        row: dict = {"length": length, "seconds": times}
        row["mebibytes"] = {form: peak_memory(length, form) for form in forms}
        if len(forms) > 1:  # of each repeat, its two passes being neighbours in time
            fast, slow = (times[form] for form in forms)
            row["ratios"] = [b / a for a, b in zip(fast, slow, strict=True)]
        rows.append(row)
    return rows


def spread(values: list[float]) -> tuple[float, float, float]:
    """Least, median, most."""
    return min(values), statistics.median(values), max(values)


def growth(rows: list[dict]) -> float:
    """Exponent p of time ~ T^p between the shortest and the longest sequence, least squares in logs."""
    x = torch.tensor([row["length"] for row in rows]).double().log()
    y = (
        torch.tensor([statistics.median(row["seconds"]["chunk-wise"]) for row in rows])
        .double()
        .log()
    )
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item()


def show(rows: list[dict], exponent: float, console: Console) -> None:
    table = Table(title=f"forward + backward, H = {HEADS}, K = V = {DIM}, float32, 30 steps")
    names = ("T", "chunk-wise s (min-max)", "us a token", "MiB", "token by token s", "MiB")
    names = (*names, "ratio (min-max)")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        fast, slow = (row["seconds"].get(form) for form in BACKENDS)
        least, median, most = spread(fast)
        cells = [str(row["length"]), f"{median:.3f} ({least:.3f}-{most:.3f})"]
        cells += [f"{median / row['length'] * 1e6:.0f}", f"{row['mebibytes']['chunk-wise']:.0f}"]
        if slow:
            memory = row["mebibytes"]["token by token"]
            cells += [f"{statistics.median(slow):.2f}", f"{memory:.0f}"]
            cells.append("{1:.0f}x ({0:.0f}-{2:.0f})".format(*spread(row["ratios"])))
        table.add_row(*cells)
    console.print(table)
    per_token = [statistics.median(row["seconds"]["chunk-wise"]) / row["length"] for row in rows]
    console.print(
        f"chunk-wise time grows as T^{exponent:.2f}; "
        f"the dearest token costs {max(per_token) / min(per_token):.2f} times the cheapest"
    )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for form, color, marker in zip(BACKENDS, ("#0072B2", "#D55E00"), "os", strict=True):
        part = [row for row in rows if form in row["seconds"]]
        lengths = [row["length"] for row in part]
        seconds = [statistics.median(row["seconds"][form]) for row in part]
        memory = [row["mebibytes"][form] for row in part]
        for axis, values in zip(axes, (seconds, memory), strict=True):
            axis.plot(lengths, values, color=color, marker=marker, label=form)
    for axis, label in zip(
        axes, ("seconds, forward + backward", "peak memory added, MiB"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="tokens T", ylabel=label)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (3)")
    parser.add_argument("--peak", nargs=2, metavar=("FORM", "T"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]))
        return
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}.")
    machine = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load_average_before": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    console = Console()
    begin = time.perf_counter()
    rows = measure(options.repeats, console)
    exponent = growth(rows)
    show(rows, exponent, console)
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "heads": HEADS, "dim": DIM, "exponent": exponent, "rows": rows}
    (options.output / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, options.output / "cpu.png")
    console.print(
        f"{time.perf_counter() - begin:.0f} s. Written: cpu.json, cpu.png in {options.output}"
    )


if __name__ == "__main__":
    main()
