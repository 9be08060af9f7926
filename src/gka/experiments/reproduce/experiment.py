"""What an experiment is: a claim, a prediction frozen before the run, cells, a computed verdict."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[str, Any]
"""JSON-ready figures of one cell, with the cell's own coordinates among them."""
Outcome = Literal["confirmed", "partly", "not", "open"]
Turns = Generator[bool, None, dict[str, Any]]
"""A measurement in turns: yields whether a turn did something or only waited, and returns the figures."""
SIZES = ("smoke", "quick", "full")


@dataclass(frozen=True)
class Options:
    """What a run asks for besides the size.

    Attributes:
        device: "cpu", "cuda", "cuda:1", ...
        seeds: numbers from 0 on.
        model: folder of a run of `gka train`, for the cells of a trained model. None: there are none.
        folder: of the ledger; cells may keep models in it. It does not belong to the settings.
        corpus: folder or archive of `gka.experiments.corpora`. None: one is built from what is installed.
    """

    device: str = "cpu"
    seeds: tuple[int, ...] = (0,)
    model: str | None = None
    folder: Path | None = None
    corpus: Path | None = None


@dataclass(frozen=True)
class Cell:
    """A measurement that is made and kept as a whole.

    Attributes:
        key: unique among the experiment's cells, and the same in every run.
        measure: returns the figures; it depends on nothing but the cell, and on models that cells before it
            keep in the ledger's folder.
        seconds: estimated time on one core of a CPU, or on the GPU that was asked for; for plans.
        turns: the same measurement in turns, if several cells may share a device.
        group: cells of one group are measured by one process if there are several, since they compile the
            same.
    """

    key: str
    measure: Callable[[], dict[str, Any]]
    seconds: float
    turns: Callable[[], Turns] | None = None
    group: str = ""


def whole(turns: Callable[[], Turns]) -> dict[str, Any]:
    """The figures of a measurement in turns that has the device to itself."""
    going = turns()
    while True:
        try:
            next(going)
        except StopIteration as end:
            return end.value


@dataclass(frozen=True)
class Check:
    """A statement that the results decide.

    Attributes:
        of: "claim" (what is reproduced) or "prediction" (ours, frozen before the run).
        text: the statement, with its threshold.
        found: what was measured, in words.
        passed: None if the results do not decide it, because cells are missing.
    """

    of: Literal["claim", "prediction"]
    text: str
    found: str
    passed: bool | None


@dataclass(frozen=True)
class Experiment:
    """An experiment that `gka reproduce` runs.

    Attributes:
        name, title: for commands, and for people.
        claim: what is reproduced, in a sentence.
        source: where it stands, as in "arXiv 2511.21016, figure 1a"; "ours" if nobody published it.
        prediction, refuted_by: what we expect, written before the run, and what would refute it.
        version: of the cells' meaning; a ledger of another version is refused.
        sizes: a frozen dataclass of numbers for each of `SIZES`.
        seeds: default number of seeds for each of `SIZES`.
        cells: the cells of a size.
        table: the results as Markdown.
        draw: the results as a figure.
        checks: the statements that make the verdict.
        reads_model: whether a trained model adds cells.
        corpus: opens or builds the corpus that all cells read, and returns its checksum. None: there is none.
        schedule: all cells in order, given the results so far, where they decide which cells are worth
            measuring; it returns `cells` for none. None: those of `cells`.
        together: cells that a GPU measures side by side by default.
    """

    name: str
    title: str
    claim: str
    source: str
    prediction: str
    refuted_by: str
    version: int
    sizes: Mapping[str, Any]
    seeds: Mapping[str, int]
    cells: Callable[[Any, Options], list[Cell]]
    table: Callable[[Sequence[Found]], str]
    draw: Callable[[Sequence[Found], "Figure"], None]
    checks: Callable[[Sequence[Found]], list[Check]]
    reads_model: bool = False
    corpus: Callable[[Any, Options], str] | None = None
    schedule: Callable[[Any, Options, Sequence[Found]], list[Cell]] | None = None
    together: int = 1


def outcome_of(checks: Sequence[Check], of: str = "claim") -> Outcome:
    """confirmed: every statement holds; not: none does; open: one is undecided; else partly."""
    passed = [check.passed for check in checks if check.of == of]
    if not passed or None in passed:
        return "open"
    if all(passed):
        return "confirmed"
    return "partly" if any(passed) else "not"


def largest(values: Sequence[float | None]) -> float | None:
    """The largest value, infinite if one is None (a number that was not finite); None without values."""
    return max((math.inf if x is None else x for x in values), default=None)


def at_most(
    of: Literal["claim", "prediction"], text: str, value: float | None, limit: float
) -> Check:
    """The check value <= limit; undecided for None."""
    found = "not measured" if value is None else f"{value:.2g}"
    return Check(of, text, found, None if value is None else value <= limit)


def at_least(
    of: Literal["claim", "prediction"], text: str, value: float | None, limit: float
) -> Check:
    """The check value >= limit; undecided for None."""
    found = "not measured" if value is None else f"{value:.2g}"
    return Check(of, text, found, None if value is None else value >= limit)


def finite(value: float, digits: int = 4) -> float | None:
    """`value` with a few significant digits for JSON; None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def shown(value: float | None) -> str:
    """A number of a table; None stands for one that was not finite."""
    return "not finite" if value is None else f"{value:.1e}"
