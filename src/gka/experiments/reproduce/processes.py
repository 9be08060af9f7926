"""Cells measured by several processes, and kept by one: only this process writes the ledger.

Each process measures the cells of its groups in their order, so that what a group compiles is compiled once.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from statistics import median
from typing import Any

from gka.experiments.ledger import record_of
from gka.experiments.reproduce.experiment import Cell

Keep = Callable[[Cell, dict[str, Any]], None]


def shares(cells: Sequence[Cell], processes: int) -> list[list[Cell]]:
    """The cells of each process, in order: each group to the process with the least work so far."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group or cell.key, []).append(cell)
    found: list[list[Cell]] = [[] for _ in range(min(processes, len(groups)))]
    for group in sorted(groups.values(), key=lambda g: -sum(c.seconds for c in g)):
        min(found, key=lambda share: sum(c.seconds for c in share)).extend(group)
    place = {cell.key: i for i, cell in enumerate(cells)}
    return [sorted(share, key=lambda c: place[c.key]) for share in found]


def measure_all(
    cells: Sequence[Cell], processes: int, speed: float, until: float | None, keep: Keep
) -> None:
    """Measure cells in several processes; a process that dies leaves a record of the cell it was at.

    Args:
        cells: in order.
        processes: their number at most.
        speed: seconds of a cell over its estimate, where a process has measured none.
        until: time on `time.monotonic` by which cells must be expected to end. None: no limit.
        keep: called in this process with each cell and its record.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[Any, Iterator[Cell]]] = {}
    for share in shares(cells, processes):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(share, speed, until, there), daemon=True)
        worker.start()
        there.close()
        running[here] = worker, iter(share)
    while running:
        for pipe in wait(list(running)):
            assert isinstance(pipe, Connection)
            worker, left = running[pipe]
            try:
                record = pipe.recv()
            except EOFError:
                del running[pipe]
                worker.join()
                if worker.exitcode and (cell := next(left, None)) is not None:
                    reason = f"its process ended with status {worker.exitcode}"
                    keep(cell, {"state": "failed", "reason": reason, "seconds": 0.0})
                continue
            keep(next(left), record)


def _work(share: Sequence[Cell], speed: float, until: float | None, pipe: Connection) -> None:
    """Measure a share, and send a record of each cell as soon as it is done."""
    ratios: list[float] = []
    for cell in share:
        expected = cell.seconds * (median(ratios) if ratios else speed)
        if until is not None and time.monotonic() + expected > until:
            break
        record = record_of(cell.measure)
        ratios.append(record["seconds"] / cell.seconds)
        pipe.send(record)
    pipe.close()
