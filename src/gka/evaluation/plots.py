"""Plots of results as PNG files. Most colours are from Okabe and Ito's palette for the colour-blind."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from gka.evaluation.recall import main_memories
from gka.storage import write_bytes

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

# by role of `recall.main_memories`: colour, line, marker
_RECALL_STYLES: dict[str, tuple[str, str, str]] = {
    "linear attention": ("#D55E00", "-", ""),
    "DeltaNet": ("#009E73", "-", ""),
    "GKA": ("#0072B2", "-", ""),
    "smallest ridge": ("#08306B", "--", ""),
    "largest ridge": ("#56B4E9", "--", ""),
    "exact ridge": ("#0072B2", "none", "o"),
}


def plot_recall(content: dict[str, Any], path: Path) -> None:
    """Plot error and right values of a `run_recall` result over N, one column per correlation.

    Shows the memories of `main_memories`, each named at the end of its line.
    """
    settings, main = content["settings"], main_memories(content["memories"])
    correlations = settings["correlations"]
    figure = _new_figure(max(3.4 * len(correlations) + 2.2, 7.2), 6.4)
    grid = figure.subplots(2, len(correlations), sharex=True, sharey="row", squeeze=False)
    rows = (("error", "relative error |o − v| / |v|"), ("accuracy", "right values"))
    for row, (measure, label) in enumerate(rows):
        for axes, correlation in zip(grid[row], correlations, strict=True):
            ends = _draw_memories(axes, content["measurements"], main, correlation, measure)
            axes.axvline(settings["head_dim"], color="0.6", lw=0.8, ls=(0, (2, 2)))
            axes.axhline(1, color="0.6", lw=0.8, ls=(0, (2, 2)))
        grid[row][0].set_ylabel(label)
        _set_recall_axis(grid[row][0], measure)
        _name_lines(grid[row][-1], ends)
    for axes, correlation in zip(grid[0], correlations, strict=True):
        axes.set_title(f"key cosine {correlation:g}")
    for axes in grid[1]:
        axes.set_xlabel("pairs written, N")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    note = {"color": "0.4", "fontsize": "small"}
    grid[0][0].text(min(settings["pairs"]), 1.05, "1: as far off as 0 is", va="bottom", **note)
    grid[1][0].text(settings["head_dim"], 0.02, "N = head size ", ha="right", **note)
    figure.suptitle(
        f"Reading back N key-value pairs from one head of size {settings['head_dim']}, untrained"
    )
    figure.supxlabel(
        "o: what is read for v. right values: the written value nearest in angle to o is the right one."
        " a: ridge, λ = a |H|;\ncircles: its exact solution."
        f" Lines: median, shades: range over {len(settings['seeds'])} seeds.",
        fontsize="small",
    )
    save_figure(figure, path)


def _draw_memories(
    axes: "Axes",
    measurements: Sequence[dict[str, Any]],
    main: dict[str, dict[str, Any]],
    correlation: float,
    measure: str,
) -> list[tuple[float, str, str]]:
    """Draw the lines; returns (last value, name, colour) of each."""
    ends = []
    for role, memory in main.items():
        rows = [
            m
            for m in measurements
            if m["memory"] == memory["name"] and m["correlation"] == correlation
        ]
        rows.sort(key=lambda m: m["pairs"])
        numbers = [m["pairs"] for m in rows]
        color, line, marker = _RECALL_STYLES[role]
        marker = marker or "." * (len(rows) == 1)
        middle = [median(m[measure]) for m in rows]
        axes.plot(
            numbers,
            middle,
            color=color,
            ls=line,
            marker=marker,
            ms=5,
            mfc="none",
            lw=2.4 if role == "GKA" else 1.6,
        )
        if role != "exact ridge":
            low, high = [min(m[measure]) for m in rows], [max(m[measure]) for m in rows]
            axes.fill_between(numbers, low, high, color=color, alpha=0.12, lw=0)
        ends.append((middle[-1], _recall_name(role, memory), color))
    axes.grid(alpha=0.25)
    return ends


def _recall_name(role: str, memory: dict[str, Any]) -> str:
    if memory["ridge_ratio"] is None:
        return role
    kind = "exact ridge" if role == "exact ridge" else "GKA"
    return f"{kind}, a = {memory['ridge_ratio']:g}"


def _set_recall_axis(axes: "Axes", measure: str) -> None:
    if measure != "error":
        axes.set_ylim(-0.03, 1.03)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _name_lines(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write names right of the axes at the ends of their lines, moved apart if they would overlap."""
    low, high = (axes.transScale.transform((1, y))[1] for y in axes.get_ylim())
    gap, places = 0.085, []
    for value, name, color in sorted(ends):
        value = min(max(value, axes.get_ylim()[0]), axes.get_ylim()[1])  # a log axis has no 0
        at = (axes.transScale.transform((1, value))[1] - low) / (high - low)
        places.append((at, name, color))
    heights = spread([at for at, _, _ in places], gap)
    for (at, name, color), height in zip(places, heights, strict=True):
        axes.annotate(
            name, (1, at), (1.09, height), xycoords="axes fraction", textcoords="axes fraction",
            color=color, va="center", fontsize="small", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": color, "lw": 0.8, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)
            },
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending `places` moved to distances of at least `gap` within [0, 1], with least squared moves.

    If [0, 1] has no room for that gap they are spaced evenly.
    """
    gap = min(gap, 1 / max(len(places) - 1, 1))
    # isotonic regression of places[i] - i gap: neighbours out of order are pooled at their mean
    pools: list[list[float]] = []
    for i, place in enumerate(places):
        pools.append([place - i * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    apart = [fmean(pool) for pool in pools for _ in pool]
    room = 1 - (len(places) - 1) * gap
    return [min(max(x, 0.0), room) + i * gap for i, x in enumerate(apart)]


def plot_mqar(content: dict[str, Any], path: Path) -> None:
    """Plot the test accuracies of a sweep's mixers.

    Models of several tasks: over the pairs, a panel per size. Models of one task: over the width, a panel per
    task. A sweep of one task and one size: accuracies side by side, and validation accuracy over steps.
    """
    if _asks_one_thing(content["summary"]):
        save_figure(_figure_of_one_task(content["summary"]), path)
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
    save_figure(figure, path)


def _asks_one_thing(rows: Sequence[dict[str, Any]]) -> bool:
    sizes = {(str(row["tasks"]), row["width"], row["head_dim"]) for row in rows}
    return len(sizes) == 1 and len(rows[0]["tasks"]) == 1


def _figure_of_one_task(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Left: every seed's test accuracy, best mixer on top. Right: validation accuracy over steps."""
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


def save_figure(figure: "Figure", path: Path, dpi: int = 90) -> None:
    """Write a PNG of at most 128 colours, which has a third of the bytes and looks the same."""
    from PIL import Image  # a dependency of matplotlib

    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(content, format="png", optimize=True)
    write_bytes(path, content.getvalue())
