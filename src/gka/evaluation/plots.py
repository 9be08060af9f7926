"""Results as PNG files. Colours are Okabe and Ito's, told apart by the colour-blind too."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gka.data.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIXER_STYLES = {
    "attention": ("Attention", "#000000", "s"),
    "gka": ("Gated KalmaNet", "#0072B2", "o"),
    "gated_deltanet": ("Gated DeltaNet", "#E69F00", "^"),
    "deltanet": ("DeltaNet", "#009E73", "v"),
    "gla": ("Gated linear attention", "#D55E00", "D"),
    "gla+attention": ("GLA, then attention", "#777777", "X"),
    "swa": ("Sliding window", "#CC79A7", "P"),
}

_RECALL_COLORS = {"linear attention": "#D55E00", "deltanet": "#009E73"}
_GKA_BLUES = ("#08306B", "#0072B2", "#56B4E9", "#A6CEE3")  # small ridge to large
_DASHES = ("-", ":", "--", "-.")


def plot_recall(content: dict[str, Any], path: Path) -> None:
    """Two rows (error, right values) over N, one column per correlation, of a `run_recall` result."""
    settings = content["settings"]
    correlations = settings["correlations"]
    figure = _new_figure(3.6 * len(correlations) + 2.6, 6.4)
    grid = figure.subplots(2, len(correlations), sharex=True, sharey="row", squeeze=False)
    styles = _memory_styles(content["memories"])
    rows = (("rescaled_error", "recall error"), ("accuracy", "right values"))
    for column, correlation in enumerate(correlations):
        for row, (measure, label) in enumerate(rows):
            axes = grid[row][column]
            _draw_memories(axes, content, correlation, measure, styles)
            _mark_head_size(axes, settings["head_dim"], with_label=row == 0 and column == 0)
            if column == 0:
                axes.set_ylabel(label)
        grid[0][column].set_title(f"key correlation {correlation:g}")
        grid[1][column].set_xlabel("pairs written, N")
        grid[1][column].set_xscale("log", base=2)
        grid[1][column].xaxis.set_major_formatter("{x:.0f}")
    figure.suptitle(
        f"Reading back N key-value pairs from one head of size {settings['head_dim']}, untrained"
    )
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.supxlabel(
        "error: |c o - v| / |v| at the best common scale c.  right values: the written value nearest"
        f" in angle is the right one.  Median and range over {len(settings['seeds'])} seeds.",
        fontsize="small",
    )
    _save(figure, path)


def _draw_memories(
    axes: "Axes",
    content: dict[str, Any],
    correlation: float,
    measure: str,
    styles: dict[str, dict[str, Any]],
) -> None:
    for memory in content["memories"]:
        rows = [
            m
            for m in content["measurements"]
            if m["memory"] == memory["name"] and m["correlation"] == correlation
        ]
        rows.sort(key=lambda m: m["pairs"])
        numbers = [m["pairs"] for m in rows]
        style = styles[memory["name"]]
        axes.plot(numbers, [median(m[measure]) for m in rows], label=memory["name"], **style)
        if memory["family"] != "exact ridge":
            low, high = [min(m[measure]) for m in rows], [max(m[measure]) for m in rows]
            axes.fill_between(numbers, low, high, color=style["color"], alpha=0.12, lw=0)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)


def _memory_styles(memories: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line styles by name: families differ in colour, ridges in shade, iterations in dashes."""
    ratios = sorted({m["ridge_ratio"] for m in memories if m["ridge_ratio"] is not None})
    iterations = sorted({m["num_iter"] for m in memories if m["num_iter"]}, reverse=True)
    drawn: dict[str, int] = {}
    styles: dict[str, dict[str, Any]] = {}
    for memory in memories:
        family = memory["family"]
        nth = drawn[family] = drawn.get(family, -1) + 1
        if family in _RECALL_COLORS:
            style: dict[str, Any] = {"color": _RECALL_COLORS[family], "ls": _cycle(_DASHES, nth)}
        else:
            blue = _cycle(_GKA_BLUES, ratios.index(memory["ridge_ratio"]))
            if family == "gka":
                style = {"color": blue, "ls": _cycle(_DASHES, iterations.index(memory["num_iter"]))}
            else:
                style = {"color": blue, "ls": "none", "marker": "o", "ms": 5, "mfc": "none"}
        styles[memory["name"]] = {"lw": 1.8} | style
    return styles


def _cycle(entries: Sequence[str], index: int) -> str:
    return entries[index % len(entries)]


def _mark_head_size(axes: "Axes", head_dim: int, with_label: bool) -> None:
    axes.axvline(head_dim, color="0.6", lw=0.8, ls=(0, (2, 2)))
    if with_label:
        axes.text(head_dim, 0.99, " N = head size", color="0.4", fontsize="small", va="top")


def plot_mqar(content: dict[str, Any], path: Path) -> None:
    """Test accuracy of every mixer of a sweep: against the pairs, a panel per size, where models
    were trained on several tasks; otherwise against the width, a panel per task. Of a sweep of one task
    and one size: the accuracies side by side, and how they were learnt."""
    if _asks_one_thing(content["summary"]):
        _save(_figure_of_one_task(content["summary"]), path)
        return
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in content["summary"]:
        panels.setdefault(_panel_title(row), []).append(row)
    columns = min(4, len(panels))
    figure = _new_figure(max(6.5, 3.6 * columns + 2.4), 3.8 * -(-len(panels) // columns) + 0.6)
    grid = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False)
    for axes, (title, rows) in zip(grid.flatten(), panels.items(), strict=False):
        by_pairs = len(rows[0]["tasks"]) > 1
        _draw_accuracies(axes, rows, by_pairs)
        axes.set(title=title, xlabel="key-value pairs" if by_pairs else "width")
    for axes in grid.flatten()[len(panels) :]:
        axes.set_axis_off()
    grid[0][0].set_ylabel("queries answered right")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Multi-query associative recall, two-layer models of equal size")
    seeds = max(len(row["seeds"]) for row in content["summary"])
    figure.supxlabel(
        "test accuracy at each mixer's best learning rate;"
        f" lines: mean, dots: each of {seeds} seeds",
        fontsize="small",
    )
    _save(figure, path)


def _asks_one_thing(rows: Sequence[dict[str, Any]]) -> bool:
    sizes = {(str(row["tasks"]), row["width"], row["head_dim"]) for row in rows}
    return len(sizes) == 1 and len(rows[0]["tasks"]) == 1


def _figure_of_one_task(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Left every seed's test accuracy, the best mixer on top; right the validation accuracy on the way."""
    rows = sorted(rows, key=lambda row: row["test_accuracy"][0]["mean"])
    figure = _new_figure(9.6, 3.8)
    final, way = figure.subplots(1, 2, sharex=False, width_ratios=(1.15, 1))
    names = []
    for place, row in enumerate(rows):
        name, color, marker = MIXER_STYLES.get(row["mixer"], (row["mixer"], "#777777", "o"))
        found = row["test_accuracy"][0]
        names.append(f"{name}  {found['mean']:.2f}")
        final.barh(place, found["mean"], color=color, alpha=0.25, height=0.7)
        final.plot(found["by_seed"], [place] * len(found["by_seed"]), marker, color=color, ms=5)
        for curve in row["curves"]:
            steps, _, accuracies = zip(*curve, strict=True) if curve else ((), (), ())
            way.plot(steps, accuracies, color=color, lw=1.3)
    final.set_yticks(range(len(rows)), names)
    final.set(xlim=(0, 1.03), xlabel="queries answered right (test)")
    way.set(ylim=(-0.03, 1.03), xlabel="training steps", ylabel="right (validation)")
    for axes in (final, way):
        axes.grid(alpha=0.25)
    task, row = rows[0]["tasks"][0], rows[0]
    figure.suptitle(
        f"Multi-query associative recall: {task['num_kv_pairs']} pairs in {task['input_seq_len']} tokens,"
        f" two layers, width {row['width']}, head size {row['head_dim']}"
    )
    figure.supxlabel(
        "each mixer at its best learning rate, chosen on validation; a mark and a line a seed, bars:"
        " mean",
        fontsize="small",
    )
    return figure


def _panel_title(row: dict[str, Any]) -> str:
    tasks = row["tasks"]
    lengths = "/".join(map(str, sorted({task["input_seq_len"] for task in tasks})))
    if len(tasks) > 1:
        return f"width {row['width']}, head {row['head_dim']}, {lengths} tokens"
    return f"{tasks[0]['num_kv_pairs']} pairs in {lengths} tokens"


def _draw_accuracies(axes: "Axes", rows: Sequence[dict[str, Any]], by_pairs: bool) -> None:
    points: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        for task, found in zip(row["tasks"], row["test_accuracy"], strict=True):
            x = task["num_kv_pairs"] if by_pairs else row["width"]
            points.setdefault(row["mixer"], []).append((x, found))
    for mixer, found in points.items():
        found.sort(key=lambda point: point[0])
        name, color, marker = MIXER_STYLES.get(mixer, (mixer, "#777777", "o"))
        numbers = [x for x, _ in found]
        means = [accuracy["mean"] for _, accuracy in found]
        axes.plot(numbers, means, color=color, marker=marker, label=name, lw=1.8, ms=6)
        for x, accuracy in found:
            axes.plot([x] * len(accuracy["by_seed"]), accuracy["by_seed"], ".", color=color, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for found in points.values() for x, _ in found}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    """A PNG of at most 128 colours, which takes a third of the bytes and looks the same."""
    from PIL import Image  # matplotlib brings it

    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(content, format="png", optimize=True)
    write_bytes(path, content.getvalue())
