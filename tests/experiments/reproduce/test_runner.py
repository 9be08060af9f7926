"""The runner of experiments: cells that are kept, tried again, refused, planned and judged."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gka.errors import InputError
from gka.experiments.reproduce.experiment import (
    Cell,
    Check,
    Experiment,
    Found,
    Options,
    at_most,
    finite,
    largest,
    outcome_of,
)
from gka.experiments.reproduce.registry import EXPERIMENTS, find
from gka.experiments.reproduce.runner import Reproduction, last_verdicts


@dataclass(frozen=True)
class Size:
    count: int


class Squares:
    """An experiment whose cells are noted, and fail while `broken`."""

    def __init__(self) -> None:
        self.measured: list[int] = []
        self.broken = False

    def cells(self, size: Size, options: Options) -> list[Cell]:
        return [
            Cell(f"{n}, seed {s}", lambda n=n, s=s: self.measure(n, s), 2.0)
            for s in options.seeds
            for n in range(size.count)
        ]

    def measure(self, n: int, seed: int) -> dict[str, Any]:
        self.measured.append(n)
        if self.broken and n == 1:
            raise RuntimeError("no square\nof one")
        return {"n": n, "seed": seed, "square": n * n}

    def experiment(self, version: int = 1) -> Experiment:
        def checks(results: Sequence[Found]) -> list[Check]:
            return [
                at_most("claim", "squares at most 4", largest([r["square"] for r in results]), 4)
            ]

        def draw(results: Sequence[Found], figure: Any) -> None:
            figure.subplots().plot([r["square"] for r in results])

        sizes = {"smoke": Size(1), "quick": Size(3), "full": Size(5)}
        return Experiment(
            "squares", "squares of numbers", "Squares are small.", "ours", "They are.", "A large one.",
            version, sizes, dict.fromkeys(sizes, 1), self.cells,
            lambda results: f"{len(results)} squares",
            draw, checks,
        )  # fmt: skip


def reproduction(
    squares: Squares, folder: Path, size: str = "quick", version: int = 1, seeds: int = 1
) -> Reproduction:
    options = Options(seeds=tuple(range(seeds)))
    return Reproduction(squares.experiment(version), size, options, folder, "gka reproduce squares")


def test_finished_cells_are_kept_and_failed_ones_tried_again(tmp_path: Path) -> None:
    """A failure is recorded with its reason and the run goes on; the next run measures that cell alone."""
    squares = Squares()
    squares.broken = True
    first = reproduction(squares, tmp_path)
    assert first.run() == [] and squares.measured == [0, 1, 2]
    assert first.failed() == {"1, seed 0": "RuntimeError: no square"}
    assert first.report()["claim"] == "open"
    assert "- 1, seed 0: RuntimeError: no square" in (tmp_path / "squares.md").read_text()

    squares.broken = False
    second = reproduction(squares, tmp_path)
    second.run()
    assert squares.measured == [0, 1, 2, 1] and not second.failed()
    assert second.report()["claim"] == "confirmed"
    third = reproduction(squares, tmp_path, seeds=2)  # further seeds are further cells
    third.run()
    assert squares.measured[4:] == [0, 1, 2]
    found = json.loads((tmp_path / "squares.json").read_text())
    assert len(found["cells"]) == 6 and [run["seeds"] for run in found["runs"]][-1] == [0, 1]
    assert {"command", "hardware", "environment"} <= found["runs"][0].keys()
    assert (tmp_path / "squares.png").read_bytes().startswith(b"\x89PNG")


def test_the_ledger_is_whole_after_every_cell(tmp_path: Path) -> None:
    """What is measured stands in the file before the next cell begins."""
    squares, seen = Squares(), []

    def look(cell: Cell, record: Any) -> None:
        seen.append(len(json.loads((tmp_path / "squares.json").read_text())["cells"]))

    reproduction(squares, tmp_path).run(on_cell=look)
    assert seen == [1, 2, 3]


def test_ledgers_of_other_versions_and_settings_are_refused(tmp_path: Path) -> None:
    """Figures are never mixed: the message says what differs."""
    squares = Squares()
    reproduction(squares, tmp_path).run()
    with pytest.raises(InputError, match=r"version: 1 there, 2 here.*another --output"):
        reproduction(squares, tmp_path, version=2)
    with pytest.raises(InputError, match="size: quick there, full here"):
        reproduction(squares, tmp_path, size="full")
    with pytest.raises(InputError, match="size is 'large'; expected one of smoke, quick, full"):
        reproduction(squares, tmp_path, size="large")
    options = Options(model=str(tmp_path))
    with pytest.raises(InputError, match="squares reads no model"):
        Reproduction(squares.experiment(), "quick", options, tmp_path, "")
    reads = replace(squares.experiment(), reads_model=True)
    with pytest.raises(InputError, match="holds no model"):
        Reproduction(reads, "quick", options, tmp_path / "other", "")


def test_a_cell_that_does_not_fit_is_left(tmp_path: Path) -> None:
    """The plan follows measured times; --minutes ends a run before it, and a verdict waits for all cells."""
    squares = Squares()
    run = reproduction(squares, tmp_path)
    assert run.plan().total == 6.0 and "estimated" in str(run.plan())
    assert [cell.key for cell in run.run(minutes=1.9 / 60)] == [
        "0, seed 0",
        "1, seed 0",
        "2, seed 0",
    ]
    run.run(minutes=2.1 / 60)  # the first cell is much faster than estimated, so the others fit too
    assert squares.measured == [0, 1, 2]
    assert not run.plan().cells and run.plan().measured

    slow = reproduction(Squares(), tmp_path / "slow")
    slow.ledger.attempt("0, seed 0", lambda: {"square": 9})
    slow.known["0, seed 0"]["seconds"] = 4.0
    assert slow.plan().total == 8.0 and "from 1 measured cells" in str(slow.plan())
    assert slow.report()["claim"] == "open"  # although 9 is above 4


def test_verdicts_follow_the_statements(tmp_path: Path) -> None:
    """All, some or none of the claim's statements hold; predictions are judged apart, smoke not at all."""
    yes, no, open_ = (Check("claim", "", "", passed) for passed in (True, False, None))
    assert [outcome_of(c) for c in ([yes, yes], [yes, no], [no], [yes, open_], [])] == [
        "confirmed", "partly", "not", "open", "open",
    ]  # fmt: skip
    assert outcome_of([yes, Check("prediction", "", "", False)], "prediction") == "not"
    assert at_most("claim", "", largest([1.0, None]), 5.0).passed is False  # None was not finite
    assert at_most("claim", "", largest([]), 5.0).passed is None and finite(float("nan")) is None
    for size in ("smoke", "full"):
        run = reproduction(Squares(), tmp_path / size, size)
        run.run()
        assert run.report()["claim"] == {"smoke": "open", "full": "not"}[size]


def test_the_list_has_the_last_verdict(tmp_path: Path) -> None:
    """Of the largest size that decided; unknown names are refused with those there are."""
    name = next(iter(EXPERIMENTS))
    for size, verdict in (("smoke", "open"), ("quick", "partly"), ("full", "open")):
        (tmp_path / size).mkdir()
        file = tmp_path / size / f"{name}.json"
        file.write_text(json.dumps({"verdict": {"claim": verdict}}))
    assert last_verdicts(tmp_path) == {name: ("quick", "partly")}
    with pytest.raises(InputError, match="no experiment 'mqar2'; there are convergence, gradients"):
        find("mqar2")


def taken(log: list[str], name: str, turns: int, fails: bool = False) -> Any:
    """A measurement in turns that notes them."""
    for _ in range(turns):
        log.append(name)
        yield True
    if fails:
        raise RuntimeError("no more")
    yield False
    return {"square": turns}


def in_turns(log: list[str], counts: dict[str, int], fails: str = "") -> Experiment:
    """An experiment whose cells take turns; a further cell follows from the first results."""

    def cell(name: str) -> Cell:
        return Cell(
            name, lambda: {"square": 0}, 1.0, lambda: taken(log, name, counts[name], name == fails)
        )

    def schedule(size: Size, options: Options, results: Sequence[Found]) -> list[Cell]:
        return [cell(name) for name in counts if name != "more" or results]

    return replace(
        Squares().experiment(),
        cells=lambda size, options: schedule(size, options, ()),
        schedule=schedule,
    )


def test_cells_side_by_side_take_turns_and_each_is_kept_when_it_ends(tmp_path: Path) -> None:
    """At most so many at a time; one that fails ends alone; results may ask for further cells."""
    log: list[str] = []
    experiment = in_turns(log, {"a": 3, "b": 1, "c": 2, "more": 1}, fails="b")
    run = Reproduction(experiment, "quick", Options(), tmp_path, "")
    assert run.run(together=2) == []
    assert log[:3] == ["a", "b", "a"] and log.index("c") > log.index("b")
    assert run.failed() == {"b": "RuntimeError: no more"} and log.count("b") == 1
    assert sorted(r["square"] for r in run.results) == [1, 2, 3]
    assert {"a", "c", "more"} == {k for k, r in run.known.items() if r["state"] == "done"}


def test_cells_that_run_when_the_time_is_over_are_given_up(tmp_path: Path) -> None:
    """They are among those left, and nothing of them is kept."""
    log: list[str] = []
    run = Reproduction(in_turns(log, {"a": 10**9}), "quick", Options(), tmp_path, "")
    run.known["x"] = {"state": "done", "result": {"square": 1}, "seconds": 0.0, "run": 0}
    assert [cell.key for cell in run.run(minutes=1.5 / 60, together=2)] == ["a"]
    assert log and "a" not in run.known


def test_cells_without_turns_need_the_device_to_themselves(tmp_path: Path) -> None:
    """--together is refused where it would be ignored."""
    with pytest.raises(InputError, match=r"--together: .* to themselves"):
        reproduction(Squares(), tmp_path).run(together=2)
