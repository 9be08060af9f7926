"""The figures of an inspection, as SVG text. Heads are told apart by colours the colour-blind see too."""

import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's; with more heads a continuous scale takes over
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_PANELS = (
    ("memory", "tokens remembered", True),
    ("lambda", "ridge λ", True),
    ("condition", "condition of H + λI", False),
    ("error", "solve error, A-norm, relative", True),
    ("steps", "solver steps", False),
)


def overview(content: dict[str, Any]) -> "Figure":
    """Layers by heads: half-life, |H|, |U| at the end, and the largest solve error over its bound."""
    layers = gka_layers(content)
    rows = [layer["layer"] for layer in layers]
    maps = (
        ("half-life in tokens", [[h["half_life"] for h in x["heads"]] for x in layers], True),
        ("|H| at the end", [[h["final_norm_h"] for h in x["heads"]] for x in layers], True),
        ("|U| at the end", [[h["final_norm_u"] for h in x["heads"]] for x in layers], True),
        ("largest solve error / bound", [_worst_over_bound(x) for x in layers], False),
    )
    figure = _figure(13, 1.7 + 0.34 * len(rows))
    for axes, (title, values, is_log) in zip(figure.subplots(1, 4), maps, strict=True):
        _heat(axes, values, rows, is_log)
        axes.set_title(title, fontsize=10)
    return figure


def layer_figure(layer: dict[str, Any], positions: list[int]) -> "Figure":
    """One layer: decay of each head, and what changes along the text."""
    figure = _figure(13, 5.6)
    axes = figure.subplots(2, 3).flat
    _draw_decay(axes[0], layer)
    colors = _head_colors(len(layer["heads"]))
    for panel, (name, title, is_log) in zip(list(axes)[1:], _PANELS, strict=True):
        _draw_curves(panel, layer["curves"][name], positions, colors, is_log)
        panel.set_title(title, fontsize=10)
        bound = {"condition": "condition_bound", "error": "error_bound", "steps": "num_iter"}.get(
            name
        )
        if bound is not None and layer[bound]:
            label = "num_iter" if name == "steps" else "bound"
            panel.axhline(layer[bound], color="#777777", ls="--", lw=1.2, label=label)
            panel.legend(fontsize=8, frameon=False)
        if name == "steps":
            panel.set_ylim(0, 1.15 * max(layer["num_iter"], 1))
        if name == "condition":
            panel.set_ylim(bottom=0, top=1.2 * layer["condition_bound"])
    return figure


def svg(figure: "Figure") -> str:
    """The figure as an SVG document; text stays text, in the reader's own font."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def gka_layers(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers with something to show."""
    return [layer for layer in content["layers"] if "heads" in layer]


def worst_errors(layer: dict[str, Any]) -> list[float | None]:
    """Each head's largest solve error; None where nothing was solved."""
    by_head = zip(*layer["curves"]["error"], strict=True)
    return [max((e for e in errors if e is not None), default=None) for errors in by_head]


def _worst_over_bound(layer: dict[str, Any]) -> list[float | None]:
    bound = layer["error_bound"]
    return [None if e is None or not bound else e / bound for e in worst_errors(layer)]


def _heat(axes: "Axes", values: list[list[float | None]], rows: list[int], is_log: bool) -> None:
    from matplotlib.colors import LogNorm, Normalize

    heads = max(map(len, values))
    grid = [[math.nan if v is None else v for v in row] for row in values]
    grid = [row + [math.nan] * (heads - len(row)) for row in grid]
    known = [v for row in grid for v in row if math.isfinite(v) and (v > 0 or not is_log)]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    norm = LogNorm(low, max(high, low * 1.01)) if is_log else Normalize(0, max(high, 1.0))
    image = axes.imshow(grid, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=8)
    axes.set_xticks(range(heads), [str(h) for h in range(heads)], fontsize=7)
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)  # type: ignore[union-attr]
    bar.ax.tick_params(which="both", labelsize=7)


def _draw_decay(axes: "Axes", layer: dict[str, Any]) -> None:
    """5, 25, 50, 75, 95 % of gamma over the tokens, by head."""
    colors = _head_colors(len(layer["heads"]))
    for head, found in enumerate(layer["heads"]):
        q5, q25, q50, q75, q95 = found["decay_quantiles"]
        axes.plot([head, head], [q5, q95], color=colors[head], lw=1.2)
        axes.plot([head, head], [q25, q75], color=colors[head], lw=6, solid_capstyle="butt")
        axes.plot([head], [q50], "_", color="black", ms=11, mew=1.2)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xticks(range(len(colors)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("head", fontsize=9)
    axes.set_title("decay γ per token: 5 to 95 %, quartiles, median", fontsize=10)
    axes.grid(axis="y", alpha=0.25)


def _draw_curves(
    axes: "Axes",
    curve: list[list[float | None]],
    positions: list[int],
    colors: list[Any],
    is_log: bool,
) -> None:
    for head, color in enumerate(colors):
        numbers = [row[head] for row in curve]
        values = [math.nan if x is None else x for x in numbers]
        axes.plot(positions, values, color=color, lw=1.3, marker="." if len(values) < 3 else "")
    if is_log and any(v for row in curve for v in row):
        axes.set_yscale("log")
    axes.set_xlabel("position", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _head_colors(heads: int) -> list[Any]:
    if heads <= len(_COLORS):
        return list(_COLORS[:heads])
    from matplotlib import colormaps

    return [colormaps["viridis"](0.95 * head / (heads - 1)) for head in range(heads)]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
