"""Training steps of whole models, by mixer and size: `python -m benchmarks.run model --output DIR`.

Every cell (size, mixer, way of compiling, way of checkpointing) runs in a process of its own, alone on the
device, one after the other. model.json is written after each; started again with the same --output, cells
that are there are not measured again. Then model.md, a table, and model.png.

Step times are between CUDA events of queued steps, host times until the call of a step returns while earlier
ones still run, device time the sum of a step's kernels by torch.profiler. MFU is (model FLOPs of a step) /
(its median time) / (the card's dense bfloat16 peak by its data sheet); once with 6 N a token, N without the
embedding, once with the mixer's own products too (formulas: benchmarks/model/sizes.py). What checkpointing
recomputes is not counted. Where memory does not suffice, --checkpoint auto tries again with selective, then
with full checkpointing. --profile shows the kernels of a step by group, those of known cells too.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import results
from benchmarks.model import step, training_report
from benchmarks.model.sizes import DEFAULT_MIXERS, MIXERS, SIZES
from benchmarks.model.step import COMPILES, Cell

from gka.experiments.fla_mixers import LAYERS
from gka.experiments.ledger import Ledger, refusing
from gka.storage import read_json, write_json
from gka.training.config import CHECKPOINTING

AUTO, TRIED = "auto", ("none", "selective", "full")


def key(cell: Cell) -> str:
    """A cell's name in the ledger."""
    return f"{cell.size}/{cell.mixer}/{cell.compiled}/{cell.checkpoint}"


def cells(options: argparse.Namespace) -> list[Cell]:
    """All that were asked for, one size after the other."""
    o = options
    asked = itertools.product(o.sizes, o.compile, o.checkpoint, o.mixers)
    return [
        Cell(size, mixer, compiled, checkpoint, o.steps, o.warm_up, str(o.device))
        for size, compiled, checkpoint, mixer in asked
    ]


def in_process(cell: Cell, folder: Path, limit: float) -> dict[str, Any]:
    """What a process of its own finds; its output is shown, and a crash is told."""
    path = folder / "cell.json"
    path.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.run", "model", "--cell", json.dumps(asdict(cell))]
    try:
        done = subprocess.run(
            [*words, "--output", str(path)], stderr=subprocess.PIPE, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "message": f"not done after {limit:.0f} s"}
    if not path.exists():
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"status": "failed", "message": f"the process ended with {done.returncode}: {last}"}
    found = read_json(path)
    path.unlink()
    return found


def measure(cell: Cell, folder: Path, limit: float) -> dict[str, Any]:
    """A cell's figures; with "auto", of the least checkpointing that fits into memory."""
    if cell.checkpoint != AUTO:
        return in_process(cell, folder, limit)
    found, failed = {}, []
    for checkpoint in TRIED:
        found = in_process(replace(cell, checkpoint=checkpoint), folder, limit)
        if found["status"] != "oom":
            break
        failed.append(checkpoint)
    return found | {"out_of_memory": failed}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not known yet, until the time is spent."""
    ledger = Ledger(options.output, "model")
    settings = {name: getattr(options, name) for name in ("steps", "warm_up", "device")}
    with refusing():
        ledger.begin(settings, resume=True)
    ledger.found["command"] = options.command
    known = ledger.found.setdefault("cells", {})
    for cell in cells(options):
        name = key(cell)
        if known.get(name, {}).get("status") == "ok":
            ledger.say(f"{name}: known")
            continue
        if options.budget is not None and ledger.elapsed >= options.budget:
            told = {"status": "not run", "message": f"the budget of {options.budget:g} s was spent"}
        else:
            ledger.say(f"{name}: {SIZES[cell.size]}")
            told = measure(cell, options.output, options.cell_seconds)
        known[name] = told | {"date": time.strftime("%Y-%m-%d")}
        ledger.note()
        ledger.say(f"{name}: {training_report.line(told)}")
    ledger.note()
    return ledger.found


def names(known: tuple[str, ...]) -> Any:
    """An argparse type: names, separated by commas."""

    def parsed(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there are {', '.join(known)}; got {name!r}")
        return found

    return parsed


def positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on; got {text!r}")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = results.parser("model", __doc__)
    add = parser.add_argument
    large = [name for name in SIZES if name != "tiny"]
    add("--sizes", type=names(tuple(SIZES)), default=large, help=f"of {','.join(SIZES)}")
    everything = (*MIXERS, *LAYERS)
    add("--mixers", type=names(everything), default=list(DEFAULT_MIXERS),
        help=f"of {','.join(everything)} (default: {','.join(DEFAULT_MIXERS)})")  # fmt: skip
    add("--steps", type=positive, default=20, help="that are timed (20)")
    add("--warm-up", type=positive, default=5, help="steps before them, after the first (5)")
    add("--compile", type=names(COMPILES), default=["layers"],
        help=f"of {','.join(COMPILES)} (layers); other cells stay in the table")  # fmt: skip
    ways = (AUTO, *CHECKPOINTING)
    add("--checkpoint", type=names(ways), default=[AUTO], help=f"of {','.join(ways)} (auto)")
    add("--profile", action="store_true", help="print the kernels of a step, by group")
    add("--budget", type=float, help="seconds after which no further cell is begun")
    add("--cell-seconds", type=float, default=900.0, help="when a cell's process is ended (900)")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = results.parse(parser, arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu --sizes tiny tries it out.")
    if "cuda-graphs" in options.compile and not options.device.startswith("cuda"):
        parser.error(f"--compile cuda-graphs needs a GPU; got --device {options.device}")
    return options


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if "--cell" in words:
        given = dict(zip(words[::2], words[1::2], strict=True))
        cell = Cell(**json.loads(given["--cell"]))
        write_json(Path(given["--output"]), step.measure(cell))
        return
    options = parse(arguments)
    found = run(options)
    training_report.write(found, options.output)
    if options.profile:
        training_report.write_profile(found, options.output)
