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
    """Test accuracy over seeds of every mixer, a panel per task and width, of a sweep's result."""
    summary = content["summary"]
    panels: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in summary:
        task = row["task"]
        key = (task["num_kv_pairs"], task["input_seq_len"], row["width"])
        panels.setdefault(key, []).append(row)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    mixers = max(len(panel) for panel in panels.values())
    figure = _new_figure(max(7.0, 4.2 * columns), rows * (1.1 + 0.42 * mixers) + 0.9)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axes, ((pairs, length, width), panel) in zip(grid, panels.items(), strict=False):
        _draw_accuracies(axes, panel)
        axes.set_title(f"{pairs} pairs in {length} tokens, width {width}")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    seeds = max(len(row["seeds"]) for row in summary)
    figure.suptitle("MQAR: queries answered right by two-layer models of equal width")
    figure.supxlabel(
        f"test accuracy at each mixer's best learning rate; bar: mean, dots: each of {seeds} seeds",
        fontsize="small",
    )
    _save(figure, path)


def _draw_accuracies(axes: "Axes", panel: Sequence[dict[str, Any]]) -> None:
    """Horizontal bars, the best mixer on top."""
    ordered = sorted(panel, key=lambda row: row["accuracy_mean"])
    names = []
    for height, row in enumerate(ordered):
        name, color, marker = MIXER_STYLES.get(row["mixer"], (row["mixer"], "0.4", "o"))
        names.append(name)
        axes.barh(height, row["accuracy_mean"], color=color, alpha=0.3, height=0.7)
        heights = [height] * len(row["accuracies"])
        axes.plot(row["accuracies"], heights, marker, color=color, ms=5, clip_on=False)
        axes.text(1.04, height, f"{row['accuracy_mean']:.3f}", va="center", fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, pil_kwargs={"optimize": True})
    write_bytes(path, content.getvalue())
