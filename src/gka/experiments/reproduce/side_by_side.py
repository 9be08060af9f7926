"""Runs cells side by side in one process: each in turn queues a little work on its device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gka.errors import InputError
from gka.experiments.reproduce.experiment import Cell, Turns

WAIT = 0.0005  # seconds, when all cells wait for the device


@dataclass
class _Running:
    cell: Cell
    turns: Turns
    began: float = field(default_factory=time.perf_counter)


def run_together(
    next_cell: Callable[[], Cell | None],
    keep: Callable[[Cell, Any, float], None],
    together: int,
    over: Callable[[], bool],
) -> None:
    """Run cells until there is no next one; those that run when the time is over are given up.

    Args:
        next_cell: a cell to start, which it does not name again; None if none is left or fits.
        keep: called with a finished cell, its figures (or the exception that ended it) and its seconds.
        together: cells at a time.
        over: whether the time is over.

    Raises:
        InputError: a cell cannot be measured in turns.
    """
    running: list[_Running] = []
    while not over():
        while len(running) < together and (cell := next_cell()) is not None:
            running.append(_started(cell))
        if not running:
            return
        busy = False
        for one in list(running):
            found = _turn(one)
            busy = busy or found is not False
            if not isinstance(found, bool):
                running.remove(one)
                keep(one.cell, found, time.perf_counter() - one.began)
        if not busy:
            time.sleep(WAIT)
    for one in running:
        one.turns.close()


def _started(cell: Cell) -> _Running:
    if cell.turns is None:
        raise InputError(
            "--together: the cells of this experiment need the device to themselves; leave it out"
        )
    return _Running(cell, cell.turns())


def _turn(one: _Running) -> Any:
    """Whether the turn did something; at the end the figures, or the exception."""
    try:
        return next(one.turns)
    except StopIteration as end:
        return end.value
    except Exception as error:
        return error
