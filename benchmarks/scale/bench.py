"""Training steps of the 440 M recipe's model on 1 to 8 GPUs of one host:
`python -m benchmarks.run scale --gpus 1,2,4,8 --output DIR`.

Rows keep the tokens of a GPU: dp shards parameters (dp_shard = n) at 2048 tokens a sequence; dp-kept keeps
gathered matrices until the backward pass; cp64k and cp256k split one sequence of n x 64k or n x 256k tokens;
mixed is dp_shard n/2 x cp 2 at 64k a GPU. First the losses of one step on every layout are compared with one
GPU's. scale.json is written after each cell; started again with the same --output, cells that are there are
not measured again. Then scale.md, a table, and scale.png.

All cells of one number of GPUs run in one start of as many processes. A cell without memory tries more
checkpointing, a cell that hangs or fails is ended and the others go on. More GPUs than the host has are
predicted by the planner (gka plan) and marked so. --tiny tries the command out on a CPU.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.scale import report, worker
from benchmarks.scale.cells import Asked, Cell, make_cells, model_config, plan_of
from benchmarks.scale.launch import Launch, available
from benchmarks.scale.options import parse

from gka.experiments.ledger import Ledger, refusing
from gka.models.flops import peak_tflops, token_flops
from gka.parallel.planner import Card, card_names, read_card
from gka.storage import read_json

TINY_PROCESSES = 2


def speeds(options: argparse.Namespace, card: str, memory: int) -> tuple[Card, str]:
    """The planner's card, and where its figures come from."""
    if options.card:
        found = read_card(options.card)
        return found, f"card {results.name_of(Path(options.card))}"
    known = next((name for name in card_names() if name.upper() in card), None)
    if known is not None:
        return read_card(known), f"card {known}"
    found = read_card("h200")
    if not memory:
        return found, "card h200"
    return replace(found, memory_gib=memory / 2**30), f"card h200 with the memory of {card}"


def plan_facts(cell: Cell, asked: Asked, card: Card, way: str) -> dict[str, Any]:
    """What is known of a cell before it is measured, or after with which checkpointing it ran."""
    config = model_config(asked.tiny)
    plan = plan_of(cell, asked.tiny, card, way)
    job = plan.job
    return {
        "row": cell.row, "gpus": cell.gpus, "sizes": list(cell.sizes), "length": cell.length,
        "tokens": cell.tokens, "compiled": cell.compiled, "checkpoint": way,
        "flops_per_token": token_flops(config, cell.length, job.matrices).known,
        "parameters": job.parameters,
        "plan": {"step_ms": 1e3 * plan.seconds, "bytes": plan.memory.total, "exposed_ms": 1e3 * plan.exposed},
    }  # fmt: skip


class Scaling:
    """One run of the benchmark: its ledger, its cells, and what the processes find."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = "cpu" if options.tiny else "cuda"
        self.there, name, memory = available(device)
        if options.tiny:
            self.there = TINY_PROCESSES
        elif not self.there:
            sys.exit("error: there is no GPU that torch can use; --tiny tries the command out")
        self.asked = Asked(
            options.tiny, options.rows, options.compile, options.checkpoint,
            2 if options.tiny else options.sequences, options.steps, options.warm_up,
        )  # fmt: skip
        self.card, source = speeds(options, name, memory)
        self.ledger = Ledger(options.output, "scale")
        settings = {
            "tiny": options.tiny, "steps": options.steps, "warm_up": options.warm_up,
            "sequences": self.asked.sequences, "card": name,
        }  # fmt: skip
        with refusing():
            self.ledger.begin(settings, resume=True)
        self.ledger.found |= {
            "command": options.command, "date": time.strftime("%Y-%m-%d"), "card": name,
            "there": self.there, "planner": source, "versions": results.versions(),
            "commit": options.commit or results.commit(),
        }  # fmt: skip
        for part in ("cells", "checks"):
            self.ledger.found.setdefault(part, {})
        self.cells = {n: make_cells(self.asked, n, self.card) for n in options.gpus}
        self.launch = Launch(
            options.output / "processes", device, options.tiny, time.time() + 60 * options.minutes,
            options.cell_seconds, options.check, self.found, self.ledger.say,
        )  # fmt: skip

    def found(self, key: str, figures: dict[str, Any]) -> None:
        """Keep a cell's figures with its plan, and tell them."""
        row, _, gpus = key.partition("/")
        if row == "check":
            self.ledger.found["checks"][gpus] = figures
            for text in report.checked({"checks": {gpus: figures}}):
                self.ledger.say(text)
            self.ledger.note()
            return
        cell = next(cell for cell in self.cells[int(gpus)] if cell.key == key)
        way = figures.get("checkpoint", cell.ways[0])
        facts = plan_facts(cell, self.asked, self.card, way)
        facts["peak_tflops"] = peak_tflops(self.ledger.found["card"])
        self.ledger.found["cells"][key] = facts | figures
        self.ledger.note()
        self.ledger.say(f"{key}: {self.told(self.ledger.found['cells'][key])}")

    def told(self, cell: dict[str, Any]) -> str:
        """A cell in a line."""
        result = self.ledger.found
        shown = dict(zip(report.HEAD, report.line(result, cell), strict=True))
        if cell["status"] not in ("ok", report.PREDICTED):
            return f"{cell['status']}: {cell['message']}"
        kept = (
            "step ms (min-max)",
            "tokens/s/GPU",
            "MFU",
            "efficiency",
            "GiB a GPU",
            "NCCL",
            "planned ms",
        )
        return ", ".join(f"{name} {shown[name]}" for name in kept if shown[name])

    def run(self) -> None:
        """Measure what is not known yet, for one number of GPUs after the other."""
        more = [n for n in self.options.gpus if n > self.there]
        if more:
            what = "processes for a trial" if self.options.tiny else f"GPUs ({self.launch.device})"
            self.ledger.say(
                f"this host has {self.there} {what}: cells of {', '.join(map(str, more))} are predicted "
                "by the planner, not measured"
            )
        for gpus in self.options.gpus:
            if gpus in more:
                self.predict(gpus)
            else:
                self.measure(gpus)
        self.ledger.note()

    def measure(self, gpus: int) -> None:
        known = self.ledger.found["cells"]
        cells = [c for c in self.cells[gpus] if known.get(c.key, {}).get("status") != "ok"]
        checked = self.ledger.found["checks"].get(str(gpus), {}).get("status") == "ok"
        if not cells:
            self.ledger.say(f"{gpus} GPUs: known")
            return
        self.ledger.say(f"{gpus} GPUs: {', '.join(cell.row for cell in cells)}")
        self.launch.run(
            gpus,
            cells,
            gpus > 1 and bool(self.options.check) and not checked,
            self.options.launch_seconds,
        )

    def predict(self, gpus: int) -> None:
        for cell in self.cells[gpus]:
            way = way_of(self.ledger.found, cell)
            self.found(cell.key, {"status": report.PREDICTED, "checkpoint": way})


def way_of(result: dict[str, Any], cell: Cell) -> str:
    """The checkpointing with which other numbers of GPUs ran the row, or that the plan takes."""
    ran = [x for x in result["cells"].values() if x["row"] == cell.row and x["status"] == "ok"]
    return ran[-1]["checkpoint"] if ran else cell.ways[0]


@contextmanager
def ending_on_term() -> Iterator[None]:
    """Let SIGTERM end the block as an exit does, so that no process of a launch stays behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def joined(paths: list[Path]) -> dict[str, Any]:
    """Stored results as one: of each cell the last that was measured, else the first.

    Raises:
        SystemExit: they are of different cards or settings.
    """
    every = [read_json(path) for path in paths]
    first = every[0]
    for path, other in zip(paths, every, strict=True):
        for fact in ("card", "settings", "commit", "versions"):
            if other[fact] != first[fact]:
                sys.exit(f"error: {path} has another {fact} than {paths[0]}: report them apart")
    found = first | {"cells": {}, "checks": {}, "there": max(x["there"] for x in every)}
    found["command"] = "; ".join(dict.fromkeys(x["command"] for x in every))
    for other in every:
        for part in ("cells", "checks"):
            known = found[part]
            known |= {k: x for k, x in other[part].items() if k not in known or x["status"] == "ok"}
    return found


def with_predictions(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Stored results, and the plans of their rows on numbers of GPUs that were not measured."""
    settings, cells = result["settings"], result["cells"]
    rows = tuple(dict.fromkeys(x["row"] for x in cells.values()))
    compiled = tuple({x["row"] for x in cells.values() if x["compiled"] != "off"})
    asked = Asked(
        settings["tiny"], rows, compiled, "auto", settings["sequences"], settings["steps"],
        settings["warm_up"],
    )  # fmt: skip
    card, _ = speeds(options, result["card"], 0)
    for gpus in options.gpus:
        for cell in make_cells(asked, gpus, card):
            if cell.key not in cells:
                facts = plan_facts(cell, asked, card, way_of(result, cell))
                peak = peak_tflops(result["card"])
                cells[cell.key] = facts | {"status": report.PREDICTED, "peak_tflops": peak}
    return result


def main(arguments: list[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    if options.worker:
        worker.run(options.worker)
        return
    if options.stored:
        report.write(with_predictions(joined(options.stored), options), options.output)
        return
    scaling = Scaling(options)
    with ending_on_term():
        scaling.run()
    found = scaling.ledger.found
    report.write(found, options.output)
    if any(check["status"] == "failed" for check in found["checks"].values()):
        sys.exit("error: not all layouts have one GPU's loss; see the checks above")
