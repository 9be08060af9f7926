"""An inspection as a table for the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gka.serving.inspection_page import number
from gka.serving.inspection_plots import worst_errors


def table(content: dict[str, Any]) -> Table:
    """A row for each layer, each figure the least and the most over its heads (and places)."""
    names = ("half-life", "remembered", "lambda", "condition", "steps", "error/bound")
    shown = Table(
        title=f"{content['tokens']:,} tokens, {len(content['positions'])} places",
        caption="least .. most over heads and places; half-life and remembered in tokens",
        box=SIMPLE_HEAD,
        padding=0,  # all of it within 80 columns
    )
    shown.add_column("layer", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    for layer in content["layers"]:
        title = f"{layer['layer']} {layer['mixer']}"
        shown.add_row(title, *(_cells(layer) if "heads" in layer else [""] * len(names)))
    return shown


def _cells(layer: dict[str, Any]) -> list[str]:
    curves = layer["curves"]
    columns = [[head["half_life"] for head in layer["heads"]]]
    for name in ("memory", "lambda", "condition", "steps"):
        columns.append([value for row in curves[name] for value in row])
    bound = layer["error_bound"]
    columns.append([e / bound for e in worst_errors(layer) if e is not None and bound])
    return [_span(values) for values in columns]


def _span(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} ..\n{high}"
