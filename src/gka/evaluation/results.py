"""Results: versions and machine, records of finished cells, rich tables."""

import json
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gka import __version__
from gka.errors import InputError
from gka.storage import read_json


def environment() -> dict[str, Any]:
    """Versions and machine of a measurement, JSON-ready."""
    return {
        "gated-kalmanet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def check_entries(**lists: Collection[Any]) -> None:
    """Raise `InputError` if a list of a grid is empty or holds an entry twice."""
    for name, entries in lists.items():
        if not entries or len(set(entries)) != len(entries):
            raise InputError(f"{name} is {entries}; expected one or more different values")


def key_of(cell: Any) -> str:
    """Key of a cell's record."""
    return json.dumps(cell, sort_keys=True)


def load_records(result_file: Path, what: str, *parts: str) -> dict[str, dict[str, Any]]:
    """Records of finished cells by key; empty if the file does not exist.

    Args:
        result_file: JSON with "cells".
        what: the kind of evaluation, for the error message.
        parts: keys of each record besides "cell" and "result".

    Raises:
        InputError: the file exists and does not hold such records.
    """
    if not result_file.exists():
        return {}
    records = read_json(result_file).get("cells")
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and {"cell", "result", *parts} <= r.keys() for r in records
    ):
        raise InputError(
            f"{result_file} does not hold the cells of {what};"
            " move it away or choose another output folder"
        )
    return {key_of(record["cell"]): record for record in records}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one CPU thread: small matrices are done before other threads wake up, and on a busy
    machine threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recall_tables(content: dict[str, Any]) -> list[Table]:
    """One table per correlation of a `run_recall` result: medians over seeds.

    Columns are the N nearest to half, one and two head dimensions; the result file has all N.
    """
    settings = content["settings"]
    shown = sorted({_nearest(settings["pairs"], settings["head_dim"] * f) for f in (0.5, 1, 2)})
    found = {(m["memory"], m["correlation"], m["pairs"]): m for m in content["measurements"]}
    tables = []
    for correlation in settings["correlations"]:
        table = Table(
            title=f"Head size {settings['head_dim']}, key cosine {correlation:g}",
            box=SIMPLE_HEAD,
        )
        table.add_column("memory", no_wrap=True)
        for num in shown:
            table.add_column(f"N = {num}", justify="right", no_wrap=True)
        for memory in content["memories"]:
            cells = (_recall_cell(found[memory["name"], correlation, num]) for num in shown)
            table.add_row(memory["name"], *cells)
        tables.append(table)
    return tables


def recall_key(content: dict[str, Any]) -> str:
    """Explanation of the tables."""
    seeds = len(content["settings"]["seeds"])
    return (
        "A cell: relative error |o - v| / |v|; what is left at the best common scale of all o;\n"
        "share of right values, where the written value nearest in angle to o is the right one.\n"
        f"Medians over {seeds} seeds. N: pairs written. a: ridge, lambda = a |H|. r: solver steps.\n"
        "beta: step of the delta rule. "
        "exact ridge: GKA's equations solved in float64."
    )


def mqar_tables(content: dict[str, Any]) -> list[Table]:
    """One table per (tasks, size) of a sweep: every mixer's test accuracies at its best learning rate."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in content["summary"]:
        groups.setdefault(str((row["tasks"], row["width"], row["head_dim"])), []).append(row)
    return [_mqar_table(rows) for rows in groups.values()]


def _mqar_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"MQAR, queries answered right: width {rows[0]['width']}, head {rows[0]['head_dim']}",
        caption=f"mean, lowest-highest of {len(rows[0]['seeds'])} seeds at the best rate"
        " (* at the edge of those tried)",
        box=SIMPLE_HEAD,
    )
    table.add_column("mixer", no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    for task in rows[0]["tasks"]:
        title = f"{task['num_kv_pairs']} of {task['input_seq_len']}"
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        rate = f"{row['learning_rate']:g}" + ("*" if row["at_edge"] else "")
        found = (f"{a['mean']:.2f}, {a['min']:.2f}-{a['max']:.2f}" for a in row["test_accuracy"])
        table.add_row(row["mixer"], f"{row['parameters']:,}", rate, *found)
    return table


def _recall_cell(measurement: dict[str, Any]) -> str:
    error, rescaled, right = (
        median(measurement[name]) for name in ("error", "rescaled_error", "accuracy")
    )
    return f"{error:5.2f} {rescaled:.2f} {right:4.0%}"


def _nearest(numbers: list[int], wanted: float) -> int:
    return min(numbers, key=lambda number: abs(number - wanted))
