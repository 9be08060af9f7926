"""Reading a long prompt, and resuming from it: `python -m benchmarks.run prefill --tokens 1048576`.

Checks first (pieces against one pass, a stored session against the one that stored it), then tokens a
second and peak memory of reading --tokens random tokens in pieces, then the time to store and to resume.
Weights are random: speed does not depend on them. Writes prefill.json and prefill.md, prints the table.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks import registry, results

from gka import GenerationSession
from gka.experiments.ledger import markdown_table, print_table
from gka.experiments.numerics import relative
from gka.experiments.stopwatch import peak_added
from gka.models import GKAForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESUMING = ("save", "load", "mapped", "next token")
HEAD = (
    "tokens", "chunk", "tokens/s", "MiB added", "state MB", *(f"{name} ms" for name in RESUMING),
)  # fmt: skip


def check(model: GKAForCausalLM, folder: Path) -> dict[str, float]:
    """Relative errors of logits: pieces against one pass, and a resumed session against its source.

    In bfloat16 one pass is itself far from float32 after many layers; pieces may be as far and half more.

    Raises:
        RuntimeError: one is larger than the dtype allows.
    """
    tokens = torch.randint(32000, (1, 700), device=model.device)
    whole = GenerationSession(model, prefill_chunk=4096).append(tokens)
    pieces = GenerationSession(model, prefill_chunk=96).append(tokens)
    whole.save(folder / "check.state")
    resumed = GenerationSession(model).load(folder / "check.state")
    found = [session.append(tokens[:, :9]).logits for session in (whole, pieces, resumed)]
    expected, piecewise, again = (x.double() for x in found if x is not None)
    errors = {"pieces": relative(piecewise, expected), "resumed": relative(again, expected)}
    limits = {"pieces": 4e-4, "resumed": 0.0}  # 20 times tests/tolerances.py: roundings grow
    if model.dtype != torch.float32:
        exact = GenerationSession(copy.deepcopy(model).float()).append(tokens).append(tokens[:, :9])
        assert exact.logits is not None
        wide = exact.logits.double()
        errors |= {"one pass, of float32": relative(expected, wide)}
        errors["pieces"] = relative(piecewise, wide)
        limits["pieces"] = 1.5 * errors["one pass, of float32"]
    for name, limit in limits.items():
        if not errors[name] <= limit:
            raise RuntimeError(f"{name}: relative error {errors[name]:.2e} > {limit:.0e}")
    return errors


def read(session: GenerationSession, tokens: torch.Tensor) -> tuple[float, float | None]:
    """Seconds, and MiB added at the height (on a GPU the allocator's, else the process's)."""
    device = session.model.device
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        begin = time.perf_counter()
        session.append(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin

    if device.type != "cuda":
        peak = peak_added(work)
        return seconds, peak
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def resume(session: GenerationSession, path: Path, repeats: int) -> dict[str, Any]:
    """Seconds to store, to load with and without the checksum, and from the file to the next token."""
    found: dict[str, Any] = {"megabytes": 0.0} | {name: [] for name in RESUMING}
    model = session.model
    for _ in range(repeats):
        for name, work in (
            ("save", lambda: session.save(path)),
            ("load", lambda: GenerationSession(model).load(path)),
            ("mapped", lambda: GenerationSession(model).load(path, verify=False, mmap=True)),
            ("next token", lambda: next(GenerationSession(model).load(path).generate(1)).tolist()),
        ):
            begin = time.perf_counter()
            work()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - begin)
    found["megabytes"] = path.stat().st_size / 1e6
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    rate = row["tokens"] / row["seconds"]
    peak = "-" if row["peak"] is None else f"{row['peak']:,.0f}"
    times = (f"{1e3 * statistics.median(row[name]):.1f}" for name in RESUMING)
    return [
        f"{row['tokens']:,}", str(row["chunk"]), f"{rate:,.0f}", peak, f"{row['megabytes']:.2f}",
        *times,
    ]  # fmt: skip


def measure(run: results.Run, model: GKAForCausalLM) -> list[dict[str, Any]]:
    """A row for each length and chunk."""
    options, rows = run.options, run.found["rows"]
    GenerationSession(model, prefill_chunk=options.chunk[0]).append([1] * options.chunk[0])
    for length in options.tokens:
        tokens = torch.randint(32000, (1, length), device=options.device)
        for chunk in options.chunk:
            session = GenerationSession(model, prefill_chunk=chunk)
            seconds, peak = read(session, tokens)
            found = resume(session, options.output / "prefill.state", options.repeats)
            row = {"tokens": length, "chunk": chunk, "seconds": seconds, "peak": peak}
            rows.append(row | found)
            run.note()
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = results.parser("prefill", __doc__, device)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1 << 20])
    add("--size", choices=registry.MODELS, default="small")
    add("--mixers", help="as in gka,gka,attention; default: gka in every layer")
    add("--chunk", type=int, nargs="+", default=[4096])
    add("--dtype", choices=DTYPES, default=None)
    add("--repeats", type=int, default=5, help="of storing and resuming")
    return results.parse(parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    mixers = None if options.mixers is None else options.mixers.split(",")
    run = results.Run("prefill", options, on_cpu="CPU")
    model = registry.model(options.size, DTYPES[dtype], options.device, mixers)
    parameters, where = sum(p.numel() for p in model.parameters()), run.found["card"]
    run.found |= {"size": options.size, "dtype": dtype, "device": where}
    run.found |= {"pattern": model.config.pattern, "parameters": parameters}
    run.found |= {"errors": check(model, options.output), "rows": []}
    rows = [cells(row) for row in measure(run, model)]
    title = f"{options.size}, {parameters / 1e6:.0f} M, {dtype}, {where}"
    print_table(HEAD, rows, title)
    print(run.found["errors"])
    run.report(f"{title}\n\n{markdown_table(HEAD, rows)}\n")
