"""An inspection for people: one HTML page that needs no network, script or other file, and a table."""

import base64
import html
import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gka.serving.inspection_plots import (
    gka_layers,
    layer_figure,
    memory_length,
    overview,
    svg,
    worst_errors,
)

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
    """The HTML text of an `inspect_model` result, which may also name its `model_folder`."""
    layers = gka_layers(content)
    name = str(content.get("model_folder", "model"))
    parts = [
        f"<h1>Memory of {html.escape(name)}</h1>",
        f"<p>{content['tokens']:,} tokens, looked at in {len(content['positions'])} places. "
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
    """Each figure as its own image, so that the names inside one do not meet those of another."""
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
    """Three digits; a dash for what does not exist."""
    if value is None:
        return "–"
    return "∞" if value == math.inf else f"{value:.3g}"


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
