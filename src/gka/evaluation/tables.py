"""Results as rich tables."""

from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def recall_tables(content: dict[str, Any]) -> list[Table]:
    """One table per correlation of a `run_recall` result: medians over seeds at a few N.

    The N shown are those nearest to half, one and two head dimensions; the file has all of them.
    """
    settings = content["settings"]
    shown = sorted({_nearest(settings["pairs"], settings["head_dim"] * f) for f in (0.5, 1, 2)})
    found = {(m["memory"], m["correlation"], m["pairs"]): m for m in content["measurements"]}
    tables = []
    for correlation in settings["correlations"]:
        table = Table(
            title=f"Head size {settings['head_dim']}, key correlation {correlation:g}",
            caption="error, error at the best common scale, right values; medians over"
            f" {len(settings['seeds'])} seeds",
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


def mqar_table(content: dict[str, Any]) -> Table:
    """The summary of a sweep: best learning rate and test accuracy of every mixer at every size."""
    table = Table(
        title="MQAR: fraction of queries answered right, at each mixer's best learning rate",
        caption="* best rate at the edge of those tried: a wider sweep may do better",
        box=SIMPLE_HEAD,
    )
    for name in ("pairs", "length", "width", "mixer", "parameters", "rate", "mean"):
        table.add_column(name, justify="left" if name == "mixer" else "right", no_wrap=True)
    table.add_column("every seed", no_wrap=False)
    last = None
    for row in content["summary"]:
        task = row["task"]
        size = (str(task["num_kv_pairs"]), str(task["input_seq_len"]), str(row["width"]))
        if last not in (None, size):
            table.add_section()
        last = size
        rate = f"{row['learning_rate']:g}" + ("*" if row["at_edge"] else "")
        spread = " ".join(f"{a:.3f}" for a in row["accuracies"])
        mean = Text(f"{row['accuracy_mean']:.3f}", style="bold")
        table.add_row(*size, row["mixer"], f"{row['parameters']:,}", rate, mean, spread)
    return table


def _recall_cell(measurement: dict[str, Any]) -> str:
    error, rescaled, right = (
        median(measurement[name]) for name in ("error", "rescaled_error", "accuracy")
    )
    return f"{error:5.2f} {rescaled:5.2f} {right:5.0%}"


def _nearest(numbers: list[int], wanted: float) -> int:
    return min(numbers, key=lambda number: abs(number - wanted))
