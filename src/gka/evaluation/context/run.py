"""A grid of models, tasks, lengths and depths: one cell at a time, in one result file.

The result file is rewritten atomically after every finished cell. Cells found in it are not run again; cells
of other grids stay in it.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gka.checkpoints.open import load_model, load_tokenizer_of, model_folder
from gka.data.text import Document, check_vocabulary
from gka.errors import InputError
from gka.evaluation.context.haystack import Haystack, Pieces
from gka.evaluation.context.reader import Reader
from gka.evaluation.context.scoring import Grader, bits_per_byte, window, window_bits
from gka.evaluation.context.tasks import NAMES, PERPLEXITY, TASKS, draw_sample
from gka.evaluation.results import check_entries, environment, key_of, load_records
from gka.storage import write_json

FORMAT = 1
SHORTEST = 256


@dataclass(frozen=True)
class Grid:
    """The cells to run for each model.

    Attributes:
        tasks: names of `gka.evaluation.context.tasks.NAMES`.
        lengths: tokens of the prompts, each 256 or more.
        depths: places of the line that is asked for, 0 (beginning) to 1 (end); for tasks with `has_depth`.
        samples: prompts per cell.
        seed: of all random choices, from 0 to 2**64 - 1.

    Raises:
        InputError: something is empty, repeated or out of range; the message names it.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_entries(tasks=self.tasks, lengths=self.lengths, depths=self.depths)
        for task in self.tasks:
            if task not in NAMES:
                raise InputError(f"tasks holds {task!r}; expected names among {', '.join(NAMES)}")
        if min(self.lengths) < SHORTEST:
            raise InputError(
                f"lengths holds {min(self.lengths)}; expected {SHORTEST} tokens or more"
            )
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths is {self.depths}; expected numbers from 0 to 1")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; expected 1 or more")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; expected a number from 0 to {2**64 - 1}")

    def cells(self) -> list["Cell"]:
        """All cells, in the order of `lengths`, then of `tasks` and `depths`."""
        return [
            Cell(task, length, depth, self.samples, self.seed)
            for length in self.lengths
            for task in self.tasks
            for depth in (self.depths if task in TASKS and TASKS[task].has_depth else (None,))
        ]


@dataclass(frozen=True)
class Cell:
    """Samples of one task at one length and, where the task has one, one depth."""

    task: str
    length: int
    depth: float | None
    samples: int
    seed: int


@dataclass(frozen=True)
class Subject:
    """One model to evaluate.

    Attributes:
        name: `folder` as a string.
        folder: folder of the model.
        fingerprint: `model_fingerprint` of the folder.
        haystack: the text in the model's tokens.
    """

    name: str
    folder: Path
    fingerprint: str
    haystack: Haystack

    @classmethod
    def open(cls, folder: Path, documents: Sequence[Document]) -> "Subject":
        """The model of a folder, without weights; raises `InputError` if a part is missing."""
        pieces = Pieces(load_tokenizer_of(folder))
        return cls(str(folder), folder, model_fingerprint(folder), Haystack(documents, pieces))

    def describe(self, cell: Cell, dtype: str) -> dict[str, Any]:
        """A cell with everything that its result depends on, JSON-ready."""
        return asdict(cell) | {
            "model": self.name,
            "model_sha256": self.fingerprint,
            "text_sha256": self.haystack.fingerprint,
            "dtype": dtype,
            "format": FORMAT,
        }


@dataclass(frozen=True)
class Machine:
    """How a model runs: its `device`, `dtype` of its weights, `chunk` of tokens per forward pass."""

    device: str = "cpu"
    dtype: str = "auto"
    chunk: int = 2048


def run_grid(
    grid: Grid,
    subjects: Sequence[Subject],
    result_file: Path,
    machine: Machine,
    on_cell: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Run the cells that `result_file` does not hold yet.

    Args:
        grid: the cells.
        subjects: the models, loaded one after another, each only if it has cells to run.
        result_file: JSON, created if missing and rewritten atomically after each cell.
        machine: device, dtype and chunk.
        on_cell: called with each record in the grid's order, new or found in `result_file`.

    Returns:
        {"environment", "asked" (records of this grid), "cells" (all records)}; a record has "cell",
        "result" and "samples".

    Raises:
        InputError: a length is too short, the result file is not an evaluation's, or scores are not finite.
    """
    records = load_records(result_file, "an evaluation", "samples")
    check_lengths(grid, subjects)
    asked = []
    for subject in subjects:
        grader: Grader | None = None
        for cell in grid.cells():
            described = subject.describe(cell, machine.dtype)
            key = key_of(described)
            if key not in records:
                grader = grader or _grader(subject, machine)
                records[key] = {"cell": described} | _run_cell(cell, subject, grader)
                write_json(
                    result_file, {"environment": environment(), "cells": list(records.values())}
                )
            asked.append(key)
            on_cell(records[key])
    content = {
        "environment": environment() | asdict(machine),
        "cells": list(records.values()),
    }
    write_json(result_file, content)
    return content | {"asked": [records[key] for key in asked]}


def check_lengths(grid: Grid, subjects: Sequence[Subject]) -> None:
    """Draw each task's prompts of the shortest length: a length that is too short fails before a model loads.

    Raises:
        InputError: a length is too short; the message names the task and the tokens it takes.
    """
    shortest = min(grid.lengths)
    for subject in subjects:
        for task in grid.tasks:
            if task in TASKS:
                for index in range(grid.samples):
                    draw_sample(task, shortest, grid.depths[0], grid.seed, index, subject.haystack)


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes, times of modification and change, and inodes of a model's files."""
    files = sorted(path for path in model_folder(folder).iterdir() if path.is_file())
    stats = [(f.name, f.stat()) for f in files]
    facts = [[n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for n, s in stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _grader(subject: Subject, machine: Machine) -> Grader:
    model = load_model(subject.folder, dtype=machine.dtype, device=machine.device)
    check_vocabulary(subject.haystack.pieces.tokenizer, model, f"model {subject.name}")
    return Grader(Reader(model, machine.chunk), subject.haystack.pieces)


def _run_cell(cell: Cell, subject: Subject, grader: Grader) -> dict[str, Any]:
    """The result and the samples of a cell."""
    began = time.perf_counter()
    if cell.task == PERPLEXITY:
        windows = (window(cell.length, cell.seed, i, subject.haystack) for i in range(cell.samples))
        start = subject.haystack.pieces.start
        samples = [window_bits(lines, grader.reader, start) for lines in windows]
        result = bits_per_byte(samples, cell.length)
    else:
        samples = [_graded(cell, i, subject.haystack, grader) for i in range(cell.samples)]
        result = {n: mean(s[n] for s in samples) for n in ("match", "rank", "chance")}
    numbers = [x for x in result.values() if isinstance(x, float)]
    if not all(map(math.isfinite, numbers)):
        raise InputError(
            f"model {subject.name} has infinite or NaN scores on {cell.task}; check its weights and dtype"
        )
    seconds = round(time.perf_counter() - began, 3)
    return {"result": result | {"seconds": seconds}, "samples": samples}


def _graded(cell: Cell, index: int, haystack: Haystack, grader: Grader) -> dict[str, Any]:
    sample = draw_sample(cell.task, cell.length, cell.depth or 0.0, cell.seed, index, haystack)
    return grader.grade(sample) | {"depths": [round(depth, 6) for depth in sample.depths]}
