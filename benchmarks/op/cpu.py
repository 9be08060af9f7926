"""The chunk-wise form against the token-by-token reference on this CPU: `python -m benchmarks.run cpu`.

Measures time and peak memory of forward + backward by length. Both forms are timed interleaved in one
process. Memory is measured in a fresh process each (only on Linux, see `peak_added` of the stopwatch).
Writes cpu.json, cpu.md and cpu.png, and prints a table.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from benchmarks import results
from torch import Tensor
from torch.nn.functional import normalize

from gka.experiments import stopwatch
from gka.experiments.ledger import markdown_table, print_table
from gka.ops import chunk_gka

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS, DIM = 2, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BOTH = (256, 512, 2048)  # lengths at which the slow reference runs too
LONG = 1024  # from this length on, the constant cost of a call is small
BACKENDS = {"chunk-wise": "torch", "token by token": "reference"}
HEAD = (
    "T", "chunk-wise s (min-max)", "us a token", "MiB", "token by token s", "MiB", "ratio (min-max)",
)  # fmt: skip


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


def peak_memory(length: int, form: str) -> float | None:
    """MiB by which forward + backward raises the peak resident size of a fresh process.

    None if the system does not report it.
    """
    command = [sys.executable, "-m", "benchmarks.run", "cpu", "--peak", form, str(length)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def print_peak(form: str, length: int) -> None:
    """Measure and print the peak; runs in `peak_memory`'s process."""
    forward_backward(inputs(64), form)  # so that memory of a first use does not count
    leaves = inputs(length)
    print(json.dumps(stopwatch.peak_added(lambda: forward_backward(leaves, form))))


def measure(run: results.Run, repeats: int) -> list[dict]:
    """One row per length: seconds of every repeat, MiB, the ratio of each repeat; written after each."""
    rows = []
    for length in LENGTHS:
        run.say(f"{length} tokens")
        leaves = inputs(length)
        forms = [form for form in BACKENDS if form == "chunk-wise" or length in BOTH]
        times: dict[str, list[float]] = {form: [] for form in forms}
        forward_backward(leaves, "chunk-wise")
        for _ in range(repeats):
            for form in forms:
                times[form].append(forward_backward(leaves, form))
        row: dict = {"length": length, "seconds": times}
        row["mebibytes"] = {form: peak_memory(length, form) for form in forms}
        if len(forms) > 1:  # per repeat, since its two passes run at nearly the same time
            fast, slow = ([[x] for x in times[form]] for form in forms)
            row["ratios"] = stopwatch.ratios(slow, fast)
        rows.append(row)
        run.note(rows=rows)
    return rows


def growth(rows: list[dict], least: int = 0) -> float:
    """Exponent p of time ~ T^p over lengths from `least` on, by least squares of logarithms."""
    rows = [row for row in rows if row["length"] >= least]
    x = torch.tensor([row["length"] for row in rows]).double().log()
    times = [statistics.median(row["seconds"]["chunk-wise"]) for row in rows]
    y = torch.tensor(times).double().log()
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item()


def exponents(rows: list[dict]) -> dict[str, float]:
    """`growth` over all lengths and over the long ones; keys are the first lengths."""
    return {str(least): growth(rows, least) for least in (rows[0]["length"], LONG)}


def table(rows: list[dict]) -> list[list[str]]:
    """A row for each length, with the columns of HEAD."""
    lines = []
    for row in rows:
        fast, slow = (row["seconds"].get(form) for form in BACKENDS)
        median, least, most = stopwatch.spread(fast)
        cells = [str(row["length"]), f"{median:.3f} ({least:.3f}-{most:.3f})"]
        cells += [f"{median / row['length'] * 1e6:.0f}", _mib(row["mebibytes"]["chunk-wise"])]
        if slow:
            cells += [f"{statistics.median(slow):.2f}", _mib(row["mebibytes"]["token by token"])]
            cells.append("{:.0f}x ({:.0f}-{:.0f})".format(*stopwatch.spread(row["ratios"])))
        lines.append(cells + [""] * (len(HEAD) - len(cells)))
    return lines


def facts(rows: list[dict], fitted: dict[str, float]) -> list[str]:
    """Lines below the table: the growth of time, and whether memory is missing."""
    powers = ", ".join(f"T^{power:.2f} from T = {least}" for least, power in fitted.items())
    lines = [f"chunk-wise time grows as {powers} on; T^1 is linear"]
    if None in (found for row in rows for found in row["mebibytes"].values()):
        lines.append("memory: not measured, /proc/self/clear_refs cannot be written on this system")
    return lines


def _mib(memory: float | None) -> str:
    return "not measured" if memory is None else f"{memory:.1f}"


def draw(rows: list[dict], figure: "Figure") -> None:
    """Draw seconds and memory of both forms over the length."""
    figure.set_size_inches(9, 3.6)
    axes = figure.subplots(1, 2)
    for form, color, marker in zip(BACKENDS, ("#0072B2", "#D55E00"), "os", strict=True):
        part = [row for row in rows if form in row["seconds"]]
        lengths = [row["length"] for row in part]
        seconds = [statistics.median(row["seconds"][form]) for row in part]
        memory = [row["mebibytes"][form] for row in part]
        for axis, values in zip(axes, (seconds, memory), strict=True):
            if None not in values:
                axis.plot(lengths, values, color=color, marker=marker, label=form)
    labels = "seconds, forward + backward", "peak memory added, MiB"
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", xlabel="tokens T", ylabel=label)
        if axis.lines:
            axis.set_yscale("log")
        else:
            axis.set_title("not measured on this system", y=0.5)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)


def machine() -> dict[str, Any]:
    """The machine on which times are measured."""
    return {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load_average_before": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("cpu", __doc__, device=None)
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (3)")
    parser.add_argument("--peak", nargs=2, metavar=("FORM", "T"), help=argparse.SUPPRESS)
    options = results.parse(parser, arguments)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]))
        return
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}.")
    run = results.Run("cpu", options, on_cpu="CPU")
    run.found |= {"machine": machine(), "heads": HEADS, "dim": DIM}
    rows = measure(run, options.repeats)
    fitted = exponents(rows)
    run.note(exponents=fitted, seconds=run.elapsed)
    title = f"forward + backward, H = {HEADS}, K = V = {DIM}, float32, 30 steps"
    print_table(HEAD, table(rows), title)
    print("\n".join(facts(rows, fitted)))
    page = "\n\n".join([title, markdown_table(HEAD, table(rows)), *facts(rows, fitted)])
    run.report(page + "\n", lambda figure: draw(rows, figure))
