"""Runs an experiment's cells, keeps them in a ledger, and writes its page and picture."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gka.errors import InputError
from gka.evaluation.results import environment
from gka.experiments.ledger import Ledger
from gka.experiments.reproduce.experiment import SIZES, Cell, Experiment, Options, outcome_of
from gka.experiments.reproduce.page import page_of
from gka.experiments.reproduce.processes import measure_all
from gka.experiments.reproduce.registry import EXPERIMENTS
from gka.experiments.reproduce.side_by_side import run_together
from gka.storage import read_json, sha256_of


@dataclass(frozen=True)
class Plan:
    """The cells that a run has to do.

    Attributes:
        cells: those that are not done, in order.
        done: number of those that are.
        speed: measured over estimated seconds of the done cells, 1 without any.
        measured: whether `speed` was measured in this ledger.
    """

    cells: list[Cell]
    done: int
    speed: float
    measured: bool

    def seconds(self, cell: Cell) -> float:
        """Expected seconds of a cell."""
        return self.speed * cell.seconds

    @property
    def total(self) -> float:
        """Expected seconds of all of them."""
        return sum(map(self.seconds, self.cells))

    def __str__(self) -> str:
        basis = f"from {self.done} measured cells" if self.measured else "estimated"
        return (
            f"{len(self.cells)} cells to measure, {self.done} kept: about"
            f" {self.total / 60:.1f} minutes ({basis})"
        )


class Reproduction:
    """One experiment at one size in one folder.

    Args:
        experiment: what to run.
        size: a name of `SIZES`.
        options: device, seeds and model.
        folder: of NAME.json, NAME.md and NAME.png; the caller holds its lock.
        command: the command line, for the ledger.

    Raises:
        InputError: the folder has figures of other settings or of another version, the size is unknown, or
            a model is given to an experiment that reads none.
    """

    def __init__(
        self, experiment: Experiment, size: str, options: Options, folder: Path, command: str
    ) -> None:
        if size not in SIZES:
            raise InputError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
        if options.model is not None and not experiment.reads_model:
            raise InputError(f"{experiment.name} reads no model; leave out --model")
        if options.corpus is not None and experiment.corpus is None:
            raise InputError(f"{experiment.name} reads no corpus; leave out --corpus")
        self.experiment, self.size, self.options = experiment, size, options
        self.fixed = experiment.cells(experiment.sizes[size], options)
        self.ledger = Ledger(folder, experiment.name, locked=True)
        self.ledger.begin(_settings(experiment, size, options), resume=True)
        # Frozen: a ledger keeps the words with which it began.
        for name in ("prediction", "refuted_by"):
            self.ledger.found.setdefault(name, getattr(experiment, name))
        self.about = _about(options, command)

    @property
    def known(self) -> dict[str, dict[str, Any]]:
        """Records of the cells, by key."""
        return self.ledger.found.setdefault("cells", {})

    @property
    def results(self) -> list[dict[str, Any]]:
        """Figures of the finished cells."""
        return [r["result"] for r in self.known.values() if r["state"] == "done"]

    @property
    def cells(self) -> list[Cell]:
        """All cells in order, as far as they are known by now."""
        schedule, size = self.experiment.schedule, self.experiment.sizes[self.size]
        return self.fixed if schedule is None else schedule(size, self.options, self.results)

    def plan(self) -> Plan:
        """What is left, and how long it takes. Failed cells are tried again."""
        cells = self.cells
        done = [c for c in cells if self.known.get(c.key, {}).get("state") == "done"]
        ratios = [self.known[c.key]["seconds"] / c.seconds for c in done]
        kept = {c.key for c in done}
        left = [c for c in cells if c.key not in kept]
        return Plan(left, len(done), median(ratios) if ratios else 1.0, bool(ratios))

    def run(
        self,
        minutes: float | None = None,
        on_cell: Callable[[Cell, Mapping], None] | None = None,
        together: int = 1,
        processes: int = 1,
    ) -> list[Cell]:
        """Measure what is left; a cell that fails is recorded with its reason, and not tried twice in a run.

        Args:
            minutes: the run ends before a cell that would not fit. None: no limit.
            on_cell: called with each cell and its record.
            together: cells that share the device. Those that have not ended in time are given up.
            processes: that measure at the same time, each one cell.

        Returns:
            The cells that did not fit.
        """
        run = len(runs := self.ledger.found.setdefault("runs", []))
        runs.append(self.about | ({"processes": processes} if processes > 1 else {}))
        began, tried = time.perf_counter(), set()

        def left(seconds: float) -> bool:
            spent = time.perf_counter() - began
            return minutes is None or spent + seconds <= 60 * minutes

        def next_cell() -> Cell | None:
            plan = self.plan()
            cell = next((c for c in plan.cells if c.key not in tried), None)
            if cell is None or not left(plan.seconds(cell)):
                return None
            tried.add(cell.key)
            return cell

        def keep(cell: Cell, found: Any, seconds: float) -> None:
            record = self.ledger.keep(cell.key, found, seconds, run=run)
            if on_cell is not None:
                on_cell(cell, record)

        if processes > 1:
            self._run_at_once(processes, minutes, run, on_cell)
        elif together > 1:
            run_together(next_cell, keep, together, lambda: not left(0))
        else:
            while (cell := next_cell()) is not None:
                record = self.ledger.attempt(cell.key, cell.measure, run=run)
                if on_cell is not None:
                    on_cell(cell, record)
        return [c for c in self.plan().cells if self.known.get(c.key, {}).get("run") != run]

    def _run_at_once(
        self,
        processes: int,
        minutes: float | None,
        run: int,
        on_cell: Callable[[Cell, Mapping], None] | None,
    ) -> None:
        """Measure what is left in several processes."""

        def keep(cell: Cell, record: dict[str, Any]) -> None:
            self.ledger.write(cell.key, record | {"run": run})
            if on_cell is not None:
                on_cell(cell, record)

        plan, until = self.plan(), None if minutes is None else time.monotonic() + 60 * minutes
        measure_all(plan.cells, processes, plan.speed, until, keep)

    def failed(self) -> dict[str, str]:
        """Reasons of failed cells, by key."""
        return {key: r["reason"] for key, r in self.known.items() if r["state"] == "failed"}

    def report(self) -> dict[str, Any]:
        """Compute the verdict and write JSON, page and picture; returns the verdict."""
        experiment = self.experiment
        results = self.results
        checks = experiment.checks(results)
        # An unfinished ledger decides nothing, nor do sizes that only show that it runs.
        complete = not self.plan().cells
        decided = complete and self.size != "smoke"
        verdict = {
            "claim": outcome_of(checks) if decided else "open",
            "prediction": outcome_of(checks, "prediction") if decided else "open",
            "checks": [asdict(check) for check in checks],
        }
        self.ledger.note(verdict=verdict, complete=complete)
        page = page_of(experiment, self.ledger.found, results, checks)
        self.ledger.report(
            page, (lambda figure: experiment.draw(results, figure)) if results else None
        )
        return verdict


def _settings(experiment: Experiment, size: str, options: Options) -> dict[str, Any]:
    """What all cells of a ledger share; seeds only add cells."""
    numbers, corpus = experiment.sizes[size], experiment.corpus
    read = {} if corpus is None else {"corpus": corpus(numbers, options)}
    return read | {
        "experiment": experiment.name,
        "version": experiment.version,
        "size": size,
        "numbers": asdict(numbers),
        "device": options.device.split(":")[0],
        "model": None if options.model is None else _weights(Path(options.model)),
    }


def _weights(folder: Path) -> str:
    """SHA-256 of the model's weights."""
    files = sorted((folder / "model").glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no model; expected the folder of a finished `gka train`")
    return "+".join(sha256_of(file) for file in files)


def _about(options: Options, command: str) -> dict[str, Any]:
    """Who measures: the command, its seeds, versions and hardware."""
    from gka.training.run import hardware

    return {
        "command": command,
        "began": time.strftime("%Y-%m-%d"),
        "seeds": list(options.seeds),
        "environment": environment(),
        "hardware": hardware(),
    }


def last_verdicts(folder: Path) -> dict[str, tuple[str, str]]:
    """(size, verdict of the claim) of each experiment, the largest size with a report under `folder`."""
    found: dict[str, tuple[str, str]] = {}
    for size in SIZES:
        for name in EXPERIMENTS:
            file = folder / size / f"{name}.json"
            if not file.exists():
                continue
            verdict = read_json(file).get("verdict", {}).get("claim", "open")
            if verdict != "open" or name not in found:
                found[name] = (size, verdict)
    return found
