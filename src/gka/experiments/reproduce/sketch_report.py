"""Of `sketching`: its cells' figures as means over seeds, as tables and as a figure."""

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import Found
from gka.experiments.reproduce.sketched_models import BASES, KEYS, WITH_RIDGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {
    "white": "#999999",
    "SiLU": "#D55E00",
    "decaying spectrum": "#0072B2",
    "trained": "#000000",
}
_HOW = {"learned": ("#009E73", "P"), "fixed": ("#CC79A7", "D")}


def cells_of(results: Sequence[Found], of: str, **where: Any) -> list[Found]:
    return [r for r in results if r["of"] == of and all(r[k] == v for k, v in where.items())]


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None without values or where one was not finite."""
    return None if not values or None in values else mean(x for x in values if x is not None)


def key_error(results: Sequence[Found], keys: str, basis: str, eighths: float) -> float | None:
    """Mean over seeds of the error on those keys at d = K * eighths / 8."""
    found = []
    for r in cells_of(results, "keys", keys=keys):
        if (d := round(r["dim"] * eighths / 8)) in r["dims"]:
            found.append(r["errors"][basis][r["dims"].index(d)])
    return _mean(found)


def loss_of(results: Sequence[Found], how: str, sketch: int | None = None) -> float | None:
    """Mean over seeds of the loss: "plain", an untrained basis, or a way of training."""
    if how in BASES:
        plain = cells_of(results, "plain")
        return _mean(
            [r["losses"][how][r["dims"].index(sketch)] for r in plain if sketch in r["dims"]]
        )
    where: dict[str, Any] = {} if how == "plain" else {"how": how, "sketch": sketch}
    return _mean(
        [r["loss"] for r in cells_of(results, "plain" if how == "plain" else "trained", **where)]
    )


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def model_dims(results: Sequence[Found]) -> list[int]:
    return sorted({d for r in cells_of(results, "plain") for d in r["dims"]})


def time_of(results: Sequence[Found], sketch: int | None, mixed: bool, what: str) -> float | None:
    found = cells_of(results, "speed", sketch=sketch, mixed=mixed)
    return found[0]["times"][what][0] if found else None


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(results: Sequence[Found]) -> str:
    """Errors by keys, losses by model, and times."""
    parts = [_key_table(results), _loss_table(results), _speed_table(results)]
    return "\n\n".join(part for part in parts if part)


def _key_table(results: Sequence[Found]) -> str:
    rows = []
    of = {kind: cells_of(results, "keys", keys=kind) for kind in KEYS}
    for kind, there in (of | {"trained": cells_of(results, "plain")}).items():
        for place, d in enumerate(there[0]["dims"] if there else ()):
            errors = [r["errors"] if kind in KEYS else r["key errors"] for r in there]
            names = [b + ridge for b in BASES for ridge in WITH_RIDGE]
            found = (_shown(_mean([e[name][place] for e in errors])) for name in names)
            energy = _mean([r["energy"][place] for r in there])
            rows.append((kind, there[0]["dim"], d, *found, _shown(energy)))
    if not rows:
        return ""
    head = ("keys", "K", "d", "random S", "the same, λ of H", "spectral S", "the same, λ of H",
            "energy inside spectral S")  # fmt: skip
    return (
        "Error |S x' − x| / |x| in the norm of H, exact solves: that of the readout if values are"
        " independent; 1 is no readout at all. The spectral basis is that of other streams (untrained keys)"
        " or other text (trained model, per head). λ of H: the ridge is a |H|, not a |SᵀHS|, which needs"
        f" H. Mean over seeds.\n\n{markdown_table(head, rows)}"
    )


def _loss_table(results: Sequence[Found]) -> str:
    plain = loss_of(results, "plain")
    rows = [("plain, all of K", "-", _shown(plain, 4), "1.0000")] if plain else []
    ways = [
        ("random S, not trained with it", "random"),
        ("spectral S, not trained with it", "spectral"),
        ("trained with a learned S", "learned"),
        ("trained with a fixed random S", "fixed"),
    ]
    for told, how in ways:
        for d in model_dims(results):
            if (loss := loss_of(results, how, d)) is not None:
                rows.append((told, str(d), _shown(loss, 4), _shown(ratio(loss, plain), 4)))
    if (loss := loss_of(results, "gla")) is not None:
        rows.append(
            ("trained without a solve (gla)", "-", _shown(loss, 4), _shown(ratio(loss, plain), 4))
        )
    if not rows:
        return ""
    seeds = len({r["seed"] for r in results if "loss" in r})
    head = ("model", "d", "held-out bits per byte", "over plain")
    return f"Small language models, mean over {seeds} seeds.\n\n{markdown_table(head, rows)}"


def _speed_table(results: Sequence[Found]) -> str:
    rows = []
    for r in cells_of(results, "speed"):
        base = cells_of(results, "speed", sketch=None, mixed=r["mixed"])
        if not base:
            continue
        plain = base[0]
        ratios = [
            f"{r['times'][w][0] / plain['times'][w][0]:.2f}"
            for w in ("forward", "both ways", "decode")
        ]
        spread = max(iqr / t for t, iqr in r["times"].values())
        learned = r["times"].get("learned map")
        rows.append((
            "-" if r["sketch"] is None else r["sketch"], "yes" if r["mixed"] else "no", r["backend"],
            *(f"{1e3 * r['times'][w][0]:.3g}" for w in ("forward", "both ways", "decode")), *ratios,
            f"{r['flops'] / plain['flops']:.2f}", f"{r['state bytes'] / plain['state bytes']:.2f}",
            "-" if learned is None else f"{1e3 * learned[0]:.2g}", f"{100 * spread:.0f} %",
        ))  # fmt: skip
    if not rows:
        return ""
    device, (batch, length, heads, dim) = (
        cells_of(results, "speed")[0][n] for n in ("device", "shape")
    )
    head = ("d", "alpha", "backend", "forward, ms", "forward + backward, ms", "decode, ms",
            "forward over plain", "both", "decode", "FLOPs over plain", "state bytes",
            "learned S, both ways, ms", "widest spread")  # fmt: skip
    return (
        f"The op on {device}: {batch} × {length} tokens, {heads} heads of K = V ="
        f" {dim}, medians; decode: one token of {batch} sequences. Spread: interquartile range over median."
        f"\n\n{markdown_table(head, rows)}"
    )


def draw(results: Sequence[Found], figure: "Figure") -> None:
    """Errors by keys; losses by d; times and FLOPs by d."""
    figure.set_size_inches(12, 4.4)
    left, middle, right = figure.subplots(1, 3)
    _draw_errors(results, left)
    _draw_losses(results, middle)
    _draw_speed(results, right)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle("Solving in d of K dimensions: (SᵀHS + λI) x' = Sᵀq, x = S x'")


def _draw_errors(results: Sequence[Found], axes: Any) -> None:
    curves = {kind: cells_of(results, "keys", keys=kind) for kind in KEYS}
    curves["trained"] = cells_of(results, "plain")
    for name, there in curves.items():
        if not there:
            continue
        shares = [d / there[0]["dim"] for d in there[0]["dims"]]
        for basis, line, marker in (("random", ":", "x"), ("spectral", "-", "o")):
            errors = [(r["errors"] if name in KEYS else r["key errors"])[basis] for r in there]
            means = [_mean(column) for column in zip(*errors, strict=True)]
            axes.plot(shares, means, line, color=_COLORS[name], marker=marker, ms=5,
                      label=f"{name} keys, {basis} S")  # fmt: skip
    axes.set(xlabel="d / K", ylabel="error of the readout", title="Sketched against whole solution",
             ylim=(0, 2.6))  # fmt: skip


def _draw_losses(results: Sequence[Found], axes: Any) -> None:
    dims = model_dims(results)
    for basis, line in (("random", ":"), ("spectral", "-")):
        losses = [loss_of(results, basis, d) for d in dims]
        axes.plot(dims, losses, line, color="#000000", marker="x" if basis == "random" else "o", ms=5,
                  label=f"trained whole, then {basis} S")  # fmt: skip
    for how, (color, marker) in _HOW.items():
        found = [(d, loss) for d in dims if (loss := loss_of(results, how, d)) is not None]
        name = "learned" if how == "learned" else "fixed random"
        axes.plot(*zip(*found, strict=True) if found else ([], []), color=color, marker=marker, ms=6,
                  label=f"trained with {name} S")  # fmt: skip
    for how, label, color in (
        ("plain", "whole solve", "#0072B2"),
        ("gla", "no solve (gla)", "#999999"),
    ):
        if (loss := loss_of(results, how)) is not None:
            axes.axhline(loss, color=color, ls="--", label=label)
    axes.set(
        xlabel="d", ylabel="held-out bits per byte", title="Small language models", xticks=dims
    )


def _draw_speed(results: Sequence[Found], axes: Any) -> None:
    dims = sorted({r["sketch"] for r in cells_of(results, "speed") if r["sketch"] is not None})
    for mixed, color in ((True, "#0072B2"), (False, "#D55E00")):
        told = "with α" if mixed else "without α"
        for what, line in (("forward", "-"), ("both ways", "--")):
            base = time_of(results, None, mixed, what)
            ratios = [ratio(time_of(results, d, mixed, what), base) for d in dims]
            label = f"time {'forward' if what == 'forward' else 'forward + backward'}, {told}"
            axes.plot(dims, ratios, line, color=color, marker="o", ms=5, label=label)
        plain = cells_of(results, "speed", sketch=None, mixed=mixed)
        found = [r["flops"] / plain[0]["flops"] for d in dims if plain
                 for r in cells_of(results, "speed", sketch=d, mixed=mixed)]  # fmt: skip
        if len(found) == len(dims):
            axes.plot(dims, found, ":", color=color, label=f"FLOPs, {told}")
    axes.axhline(1.0, color="#999999", lw=0.8)
    axes.set(
        xlabel="d", ylabel="over the plain op", title="The op's time and arithmetic", xticks=dims
    )
    axes.set_ylim(bottom=0)
