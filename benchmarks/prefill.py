"""Reading a long prompt, and resuming from it: `python -m benchmarks.prefill --tokens 1048576 --output DIR`.

Checks first (pieces against one pass, a stored session against the one that stored it), then tokens a
second and peak memory of reading --tokens random tokens in pieces, then the time to store and to resume.
Weights are random: speed does not depend on them. Writes prefill.json, prints a table.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import peak_added
from benchmarks.numerics import relative
from benchmarks.output import own
from rich.table import Table

from gka import GenerationSession
from gka.console import text_console
from gka.data.files import write_json
from gka.models import GKAConfig, GKAForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 64},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8, "head_dim": 128},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_heads": 20, "head_dim": 128},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(size: str, dtype: torch.dtype, device: str, mixers: list[str] | None) -> GKAForCausalLM:
    """A model with random weights."""
    torch.manual_seed(0)
    fields = dict(SIZES[size])
    if mixers is not None:
        fields |= {"mixers": mixers, "num_hidden_layers": len(mixers)}
    with torch.device(device):
        model: Any = GKAForCausalLM(GKAConfig(vocab_size=32000, **fields))
    return model.to(dtype).eval()


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
    found: dict[str, Any] = {
        "megabytes": 0.0,
        "save": [],
        "load": [],
        "mapped": [],
        "next token": [],
    }
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 20])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--mixers", help="as in gka,gka,attention; default: gka in every layer")
    parser.add_argument("--chunk", type=int, nargs="+", default=[4096])
    parser.add_argument("--dtype", choices=DTYPES, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="of storing and resuming")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    mixers = None if options.mixers is None else options.mixers.split(",")
    own(options.output)
    model = build(options.size, DTYPES[dtype], options.device, mixers)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    content: dict[str, Any] = {"size": options.size, "dtype": dtype, "device": where}
    content["torch"], content["pattern"] = torch.__version__, model.config.pattern
    content["parameters"] = sum(p.numel() for p in model.parameters())
    content["errors"] = check(model, options.output)
    content["rows"] = rows = []
    table = Table(title=f"{options.size}, {content['parameters'] / 1e6:.0f} M, {dtype}, {where}")
    columns = ("tokens", "chunk", "tokens/s", "MiB added", "state MB", "save ms")
    for name in (*columns, "load ms", "mapped ms", "next token ms"):
        table.add_column(name, justify="right")
    GenerationSession(model, prefill_chunk=options.chunk[0]).append([1] * options.chunk[0])
    for length in options.tokens:
        tokens = torch.randint(32000, (1, length), device=model.device)
        for chunk in options.chunk:
            session = GenerationSession(model, prefill_chunk=chunk)
            seconds, peak = read(session, tokens)
            found = resume(session, options.output / "prefill.state", options.repeats)
            rows.append(
                {"tokens": length, "chunk": chunk, "seconds": seconds, "peak": peak} | found
            )
            write_json(options.output / "prefill.json", content)
            medians = (
                statistics.median(found[n]) * 1e3 for n in ("save", "load", "mapped", "next token")
            )
            table.add_row(
                f"{length:,}", str(chunk), f"{length / seconds:,.0f}",
                "-" if peak is None else f"{peak:,.0f}", f"{found['megabytes']:.2f}",
                *(f"{ms:.1f}" for ms in medians),
            )  # fmt: skip
    console = text_console(width=110)
    console.print(table, json.dumps(content["errors"]))


if __name__ == "__main__":
    main()
