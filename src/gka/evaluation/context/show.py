"""An evaluation as tables, and as one picture per model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gka.evaluation.context.tasks import PERPLEXITY
from gka.evaluation.plots import _new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = {"rank": "ranked right", "match": "written"}
Record = dict[str, Any]


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records by model, in their order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["cell"]["model"], []).append(record)
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    """One table per model: both scores by task and length, means over depths."""
    return [_table(model, found) for model, found in by_model(records).items()]


def _table(model: str, records: list[Record]) -> Table:
    table = Table(
        title=model,
        caption="share ranked right / share written, means over samples and depths;"
        " guessing ranks as under chance. perplexity: bits per byte",
        box=SIMPLE_HEAD,
    )
    lengths = _values(records, "length")
    table.add_column("task", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    for task in _values(records, "task"):
        cells = [[r for r in _of(records, task) if r["cell"]["length"] == n] for n in lengths]
        if task == PERPLEXITY:
            table.add_row(task, "", *(f"{c[0]['result']['bits_per_byte']:.3f}" for c in cells))
            continue
        guess = mean(r["result"]["chance"] for c in cells for r in c)
        shown = (f"{_mean(c, 'rank'):.2f} / {_mean(c, 'match'):.2f}" for c in cells)
        table.add_row(task, f"{guess:.2f}", *shown)
    return table


def plot(title: str, records: Sequence[Record], path: Path) -> None:
    """Heat maps of one model over length and depth, task or position; a row of them per score."""
    asked = [r for r in records if r["cell"]["task"] != PERPLEXITY]
    read = [r for r in records if r["cell"]["task"] == PERPLEXITY]
    deep = _values([r for r in asked if r["cell"]["depth"] is not None], "task")
    whole = [r for r in asked if r["cell"]["depth"] is None]
    columns = len(deep) + bool(whole) + bool(read)
    lengths = len(_values(records, "length"))
    rows = 2 if asked else 1
    figure = _new_figure(1.2 + columns * max(2.6, 1.4 + 0.62 * lengths), 0.9 + 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, score in enumerate(SCORES if asked else ()):
        for axes, task in zip(grid[row], deep, strict=False):
            _draw(axes, _of(asked, task), "depth", score)
        if whole:
            _draw(grid[row][len(deep)], whole, "task", score)
        down = "depth (0: beginning)" if deep else ""
        grid[row][0].set_ylabel(f"{SCORES[score]}\n{down}")
    if read:
        _draw_positions(grid[0][-1], read)
        for axes in grid[1:, -1]:
            axes.set_axis_off()
    figure.suptitle(f"{title}: share of answers right by length in tokens", fontsize="medium")
    save_figure(figure, path)


def _draw(axes: "Axes", records: list[Record], down: str, score: str) -> None:
    """A heat map of a score: lengths on the x axis, `down` ("depth" or "task") on the y axis."""
    lengths, rows = _values(records, "length"), _values(records, down)
    found = {(r["cell"][down], r["cell"]["length"]): r["result"] for r in records}
    values = [[found[row, length][score] for length in lengths] for row in rows]
    axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    names = [f"{row:g}" if down == "depth" else row for row in rows]
    _label(axes, lengths, names, values, ".2f", bright=0.55)
    if down == "depth":
        guess = mean(r["result"]["chance"] for r in records)
        note = f"\nguessing: {guess:.2f}" if score == "rank" else ""
        axes.set_title(records[0]["cell"]["task"] + note, fontsize="small")
    else:
        axes.set_title("spread through the text", fontsize="small")


def _draw_positions(axes: "Axes", records: list[Record]) -> None:
    """A heat map of bits per byte: lengths on the x axis, positions on the y axis."""
    lengths = [r["cell"]["length"] for r in records]
    edges = sorted({e for r in records for e in r["result"]["edges"][:-1]})
    values = [[float("nan")] * len(lengths) for _ in edges]
    for column, record in enumerate(records):
        found = record["result"]
        for edge, bits in zip(found["edges"], found["bits_per_byte_by_position"], strict=False):
            values[edges.index(edge)][column] = bits
    axes.imshow(values, cmap="cividis_r", aspect="auto")
    flat = [v for row in values for v in row if v == v]
    middle = (min(flat) + max(flat)) / 2
    _label(
        axes, lengths, [f"from {edge:,}" for edge in edges], values, ".2f", bright=middle, dark=True
    )
    axes.set_title("bits per byte by position", fontsize="small")


def _label(
    axes: "Axes",
    lengths: Sequence[int],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    form: str,
    *,
    bright: float,
    dark: bool = False,
) -> None:
    """Label axes and cells; numbers are white on dark colours: values below `bright` (`dark`: above)."""
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                color = "white" if (value < bright) != dark else "black"
                axes.text(j, i, f"{value:{form}}", ha="center", va="center", color=color, size=7)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _values(records: Sequence[Record], name: str) -> list[Any]:
    """The distinct values of a field of cells, in their order."""
    return list(dict.fromkeys(r["cell"][name] for r in records))


def _of(records: Sequence[Record], task: str) -> list[Record]:
    return [r for r in records if r["cell"]["task"] == task]


def _mean(records: Sequence[Record], score: str) -> float:
    return mean(r["result"][score] for r in records)
