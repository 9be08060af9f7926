"""Display of an inspection: a table, and one HTML page without network access, scripts or other files.

Figures are SVG. The colours of heads can be distinguished by colour-blind readers.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1150px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-top:1px solid #ddd;padding-top:1rem}
img{width:100%;height:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #eee}th{font-weight:600}
th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}p.note{color:#555}
"""
_LEGEND = """
<b>decay γ</b>: what a state keeps of its past from one token to the next. <b>memory length</b>
1/(1 − γ): the tokens that such a decay keeps; by head over the text 5 to 95 % (line), quartiles (bar),
median. <b>half-life</b>: tokens until half is left, at the mean log decay.
<b>tokens remembered</b>: the sum of the decays from every token so far to the present one.
<b>λ</b> = a |H|: the ridge. <b>condition</b>: largest over smallest eigenvalue of H + λI, never above
(1 + a)/a. <b>solve error</b>: |x − x*| / |x*| in the norm of A = H + λI, x* being the exact solution
(Cholesky, float64); its bound is that of num_iter Chebyshev steps, and float32 adds its rounding to the
error. Curves have one colour a head, that of the head in the first panel.
"""


def page(content: dict[str, Any]) -> str:
    """The HTML page of an `inspect_model` result, which may also have `model_folder`."""
    layers = gka_layers(content)
    name = str(content.get("model_folder", "model"))
    parts = [
        f"<h1>Memory of {html.escape(name)}</h1>",
        f"<p>{content['tokens']:,} tokens, measured at {len(content['positions'])} positions. "
        f"{len(layers)} of {len(content['layers'])} layers are Gated KalmaNet.</p>",
        f"<p class='note'>{_LEGEND}</p>",
    ]
    if layers:
        parts += ["<h2>All GKA layers</h2>", _image(svg(overview(content)), "overview")]
    for layer in content["layers"]:
        parts.append(f"<h2>Layer {layer['layer']}: {html.escape(layer['mixer'])}</h2>")
        if "heads" not in layer:
            parts.append("<p class='note'>Not a ridge regression: nothing to show here.</p>")
            continue
        figure = layer_figure(layer, content["positions"])
        parts += [_settings(layer), _image(svg(figure), f"layer {layer['layer']}"), _table(layer)]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>Memory of {html.escape(name)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _image(drawing: str, name: str) -> str:
    """Embed a figure as a separate image, so that ids inside the SVGs do not collide."""
    encoded = base64.b64encode(drawing.encode()).decode()
    return f"<img alt='{html.escape(name)}' src='data:image/svg+xml;base64,{encoded}'>"


def _settings(layer: dict[str, Any]) -> str:
    bound = layer["error_bound"]
    shown = f"solver {layer['solver']}, {layer['num_iter']} steps, a = {layer['ridge_ratio']:g}"
    return f"<p>{shown}{'' if bound is None else f', error bound {bound:.2g}'}</p>"


def _table(layer: dict[str, Any]) -> str:
    names = ("head", "half-life", "memory length", "mean α", "mean β", "|H|", "|U|", "worst error")
    rows = []
    for head, (found, worst) in enumerate(zip(layer["heads"], worst_errors(layer), strict=True)):
        numbers = (
            found["half_life"], memory_length(found["decay_quantiles"][2]), found["alpha"], found["beta"],
            found["final_norm_h"], found["final_norm_u"], worst,
        )  # fmt: skip
        cells = "".join(f"<td>{number(x)}</td>" for x in numbers)
        rows.append(f"<tr><td>{head}</td>{cells}</tr>")
    header = "".join(f"<th>{name}</th>" for name in names)
    return f"<div class='wide'><table><tr>{header}</tr>{''.join(rows)}</table></div>"


def number(value: float | None) -> str:
    """A number in three digits; a dash for None."""
    if value is None:
        return "–"
    return "∞" if value == math.inf else f"{value:.3g}"


def table(content: dict[str, Any]) -> Table:
    """A row for each layer; each cell has the minimum and maximum over heads (and positions)."""
    names = ("half-life", "remembered", "lambda", "condition", "steps", "error/bound")
    shown = Table(
        title=f"{content['tokens']:,} tokens, {len(content['positions'])} positions",
        caption="minimum .. maximum over heads and positions; half-life, remembered in tokens",
        box=SIMPLE_HEAD,
        padding=0,  # so that it fits into 80 columns
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


# Colours of Okabe and Ito; more heads than colours use a continuous scale.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_PANELS = (
    ("memory", "tokens remembered", True),
    ("lambda", "ridge λ", True),
    ("condition", "condition of H + λI", False),
    ("error", "solve error, A-norm, relative", True),
    ("steps", "solver steps", False),
)
_LIMITS = {"condition": "condition_bound", "error": "error_bound", "steps": "num_iter"}


def overview(content: dict[str, Any]) -> "Figure":
    """Maps of layers by heads: half-life, final |H| and |U|, and the largest solve error over its bound."""
    layers = gka_layers(content)
    rows = [layer["layer"] for layer in layers]
    maps = (
        ("half-life in tokens", [[h["half_life"] for h in x["heads"]] for x in layers], True),
        ("|H| at the end", [[h["final_norm_h"] for h in x["heads"]] for x in layers], True),
        ("|U| at the end", [[h["final_norm_u"] for h in x["heads"]] for x in layers], True),
        ("largest solve error / bound", [_worst_over_bound(x) for x in layers], False),
    )
    figure = _figure(13, 1.7 + 0.34 * len(rows))
    grid = figure.subplots(1, 4)
    grid[0].set_ylabel("layer", fontsize=9)
    for axes, (title, values, is_log) in zip(grid, maps, strict=True):
        _heat(axes, values, rows, is_log)
        axes.set_title(title, fontsize=10)
    return figure


def layer_figure(layer: dict[str, Any], positions: list[int]) -> "Figure":
    """Panels of one layer: memory length of each head, and curves along the text."""
    figure = _figure(13, 5.6)
    axes = figure.subplots(2, 3).flat
    _draw_memory_length(axes[0], layer)
    colors = _head_colors(len(layer["heads"]))
    for panel, (name, title, is_log) in zip(list(axes)[1:], _PANELS, strict=True):
        limit = layer.get(_LIMITS.get(name, "")) or None
        _draw_curves(panel, layer["curves"][name], positions, colors, is_log, limit)
        panel.set_title(title, fontsize=10)
        if limit is not None:
            label = "num_iter" if name == "steps" else "bound"
            panel.axhline(limit, color="#777777", ls="--", lw=1.2, label=label)
            panel.legend(fontsize=8, frameon=False)
        if name == "steps":
            panel.set_ylim(0, 1.15 * max(layer["num_iter"], 1))
        if name == "condition":
            panel.set_ylim(bottom=0, top=1.2 * layer["condition_bound"])
    return figure


def svg(figure: "Figure") -> str:
    """The figure as an SVG document, with text in the reader's font."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def gka_layers(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers that were measured."""
    return [layer for layer in content["layers"] if "heads" in layer]


def worst_errors(layer: dict[str, Any]) -> list[float | None]:
    """Each head's largest solve error; None if nothing was solved."""
    by_head = zip(*layer["curves"]["error"], strict=True)
    return [max((e for e in errors if e is not None), default=None) for errors in by_head]


def _worst_over_bound(layer: dict[str, Any]) -> list[float | None]:
    bound = layer["error_bound"]
    return [None if e is None or not bound else e / bound for e in worst_errors(layer)]


def memory_length(gamma: float | None) -> float | None:
    """1/(1 - gamma), the sum of all powers of a decay, in tokens; infinity for gamma = 1, None for None."""
    if gamma is None:
        return None
    return math.inf if gamma >= 1 else 1 / (1 - gamma)


def _heat(axes: "Axes", values: list[list[float | None]], rows: list[int], is_log: bool) -> None:
    from matplotlib.colors import LogNorm, Normalize

    heads = max(map(len, values))
    grid = [[math.nan if v is None else v for v in row] for row in values]
    grid = [row + [math.nan] * (heads - len(row)) for row in grid]
    known = [v for row in grid for v in row if math.isfinite(v) and (v > 0 or not is_log)]
    if is_log:
        norm: Any = LogNorm(*round_range(known))
    else:
        norm = Normalize(0, max([1.0, *known]))
    image = axes.imshow(grid, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.set_yticks(*_every(rows, 24), fontsize=8)
    axes.set_xticks(*_every(range(heads), 10), fontsize=8)
    axes.set_xlabel("head", fontsize=9)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)  # type: ignore[union-attr]
    if is_log:
        _log_ticks(bar.ax.yaxis, norm.vmin, norm.vmax)
    bar.ax.tick_params(which="both", labelsize=8)


def _every(names: Sequence[int], most: int) -> tuple[list[int], list[str]]:
    """Places and labels of at most `most` evenly spaced ticks."""
    places = [*range(0, len(names), -(-len(names) // most))]
    return places, [str(names[place]) for place in places]


def round_range(values: list[float]) -> tuple[float, float]:
    """Round positive `values` outwards to 1, 2, 5, 10, 20 ...: from 0.3 and 7 to 0.2 and 10."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    steps = (1, 2, 5, 10)
    down, up = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.floor(math.log10(high))
    below = max(step * down for step in steps if step * down <= low * (1 + 1e-9))
    above = min(step * up for step in steps if step * up >= high * (1 - 1e-9))
    return (below, above) if below < above else (below, 2 * below)


def _log_ticks(axis: "Axis", low: float, high: float) -> None:
    """Set few and short labels: 0.0002, because 2 x 10^-4 would overlap its neighbours."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1.0, 2.0, 5.0) if high / low < 50 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axis.set_minor_formatter(NullFormatter())


def tick_text(value: float) -> str:
    """A round number as short text."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def _draw_memory_length(axes: "Axes", layer: dict[str, Any]) -> None:
    """Draw each head's 5, 25, 50, 75 and 95 % quantiles of 1/(1 - gamma) over tokens, on a log axis."""
    colors = _head_colors(len(layer["heads"]))
    lengths = [[memory_length(q) for q in head["decay_quantiles"]] for head in layer["heads"]]
    known = [x for row in lengths for x in row if x is not None and math.isfinite(x)]
    low, high = round_range([1.0, *known])
    endless = any(x == math.inf for row in lengths for x in row)
    top = 10 * high if endless else high  # where infinity is drawn
    for head, row in enumerate(lengths):
        q5, q25, q50, q75, q95 = (math.nan if x is None else min(x, top) for x in row)
        axes.plot([head, head], [q5, q95], color=colors[head], lw=1.2)
        axes.plot([head, head], [q25, q75], color=colors[head], lw=6, solid_capstyle="butt")
        axes.plot([head], [q50], "_", color="black", ms=11, mew=1.2)
    axes.set_yscale("log")
    axes.set_ylim(0.9 * low, 1.3 * top)
    _log_ticks(axes.yaxis, low, top)
    if endless:
        axes.axhline(top, color="#777777", ls="--", lw=1.2, zorder=0)
        axes.annotate("no decay", (1, top), (-3, -10), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axes.set_xticks(*_every(range(len(colors)), 10))
    axes.set_xlim(-0.6, len(colors) - 0.4)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("head", fontsize=9)
    axes.set_title("memory length 1/(1 − γ), tokens", fontsize=10)
    axes.grid(axis="y", alpha=0.25)


def _draw_curves(
    axes: "Axes",
    curve: list[list[float | None]],
    positions: list[int],
    colors: list[Any],
    is_log: bool,
    bound: float | None,
) -> None:
    """Draw one line per head; a log axis includes `bound`."""
    from matplotlib.ticker import MaxNLocator

    for head, color in enumerate(colors):
        numbers = [row[head] for row in curve]
        values = [math.nan if x is None else x for x in numbers]
        axes.plot(positions, values, color=color, lw=1.3, marker="." if len(values) < 3 else "")
    known = [v for row in curve for v in row if v]
    if is_log and known:
        axes.set_yscale("log")
        low, high = round_range(known if bound is None else [*known, bound])
        axes.set_ylim(0.9 * low, 1.1 * high)
        _log_ticks(axes.yaxis, low, high)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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

    figure = Figure(figsize=(width, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12, h_pad=0.08)  # the reader's font may be wider than the one measured here
    return figure
