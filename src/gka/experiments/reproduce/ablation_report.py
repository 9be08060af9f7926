"""Table and figure of `ablations`."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.ablation_models import BASELINE, CONSTANT, DERIVED, VARIANTS
from gka.experiments.reproduce.experiment import Found
from gka.experiments.reproduce.few_steps import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = {
    BASELINE: ("30 steps", "#0072B2"),
    "8 steps": ("8 steps", "#56B4E9"),
    "3 steps": ("3 steps", "#D55E00"),
    DERIVED.name: ("3 steps, their own derivative", "#009E73"),
    CONSTANT.name: (CONSTANT.name, "#CC79A7"),
}
_TRAINED = {
    0: "0 steps",
    1: "1 steps",
    3: "3 steps",
    5: "5 steps",
    8: "8 steps",
    15: "15 steps",
    30: BASELINE,
}


def _two_digits(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _rows(results: Sequence[Found], name: str) -> list[Found]:
    return [r for r in results if r.get("variant") == name]


def _spread(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    if not values:
        return ""
    one = f"{fmean(values):.4f}"
    return one if len(values) < 2 else f"{one} ± {stdev(values):.4f}"


def differences(results: Sequence[Found], name: str) -> list[float]:
    """Held-out loss minus the baseline's of the same seed, of the seeds that have both."""
    base = {r["seed"]: r["loss"] for r in _rows(results, BASELINE)}
    rows = _rows(results, name)
    pairs = [(r["loss"], base.get(r["seed"])) for r in rows]
    return [a - b for a, b in pairs if a is not None and b is not None]


def table(results: Sequence[Found]) -> str:
    """Variants, then reading with other solvers, then first gradients."""
    parts = [_variants(results), _readings(results), _first(results), _paths(results)]
    return "\n\n".join(part for part in parts if part)


def _variants(results: Sequence[Found]) -> str:
    lines = []
    for variant in VARIANTS:
        rows = _rows(results, variant.name)
        if not rows:
            continue
        values = {k: [r[k] for r in rows if r[k] is not None] for k in ("loss", "seen", "new")}
        norms = [x for r in rows for x in r["norms"][len(r["norms"]) // 10 :] if x is not None]
        firsts = [r["norms"][0] for r in rows if r["norms"][0] is not None]
        ms = [r["ms"] for r in rows if r["ms"] is not None]
        bad = [f"seed {r['seed']}, step {r['diverged']}" for r in rows if r["diverged"] is not None]
        lines.append((
            variant.name, len(rows), _spread(values["loss"]), _spread(differences(results, variant.name)),
            _spread(values["seen"]), _spread(values["new"]),
            f"{max(firsts):.3g}" if firsts else "", f"{max(norms):.3g}" if norms else "",
            f"{fmean(ms):.1f}" if ms else "", rows[0]["parameters"], ", ".join(bad) or "no",
        ))  # fmt: skip
    head = (
        "variant", "seeds", "loss", "minus the baseline's", "seen before", "new", "first norm",
        "largest norm", "ms a step", "parameters", "not finite",
    )  # fmt: skip
    told = (
        "Held-out loss in nats a byte, mean ± standard deviation over seeds; differences are taken seed by"
        " seed. Seen before: bytes that end a run of eight which their sequence had before. Norms of the"
        " gradient before clipping: of the first step, and the largest after the first tenth of the steps."
        " The adaptive solver computes the baseline's map, so its difference is what chance does to a run."
        " \"Constant ridge\" and \"own derivative\" run in plain torch, so their times are no comparison."
    )  # fmt: skip
    return f"{told}\n\n{markdown_table(head, lines)}"


def _readings(results: Sequence[Found]) -> str:
    """Losses with the solver changed after training, minus those with the one trained with."""
    rows, read = [], [r for r in results if "read_with" in r]
    if not read:
        return ""
    names = list(read[0]["read_with"])
    for variant in dict.fromkeys(r["variant"] for r in read):
        same = [r for r in read if r["variant"] == variant]
        cells = []
        for name in names:
            found = [(r["read_with"][name], r["loss"]) for r in same]
            good = [a - b for a, b in found if a is not None and b is not None]
            cells.append(f"{fmean(good):+.4f}" if good else "not finite")
        rows.append((variant, *cells))
    told = (
        "Loss when the solver is changed for reading alone, minus the loss without a change (mean over"
        " seeds)."
    )
    return f"{told}\n\n{markdown_table(('trained with', *names), rows)}"


def _first(results: Sequence[Found]) -> str:
    """Gradient norms before the first step, by depth and steps."""
    rows = [row for r in results if "first" in r for row in r["first"]]
    if not rows:
        return ""
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    lines = []
    for depth in dict.fromkeys(row["layers"] for row in rows):
        for kind in KINDS:
            norms = [row[kind] for row in rows if row["layers"] == depth]
            cells = ("not finite" if x is None else f"{x:.3g}" for x in norms)
            lines.append((depth, kind, *cells))
    told = (
        "Norm of all weights' gradients before the first step, by Chebyshev steps. Implicit: the library's,"
        " that of the exact solve at the computed solutions; iteration: the derivative of the steps."
    )
    return (
        f"{told}\n\n{markdown_table(('layers', 'gradient', *(f'{s} steps' for s in steps)), lines)}"
    )


def _paths(results: Sequence[Found]) -> str:
    """Gradients of the keys by path."""
    rows = [row for r in results if "paths" in r for row in r["paths"]]
    if not rows:
        return ""
    lines = [
        (r["steps"], r["kind"], *(_two_digits(r[path]) for path in ("h", "u", "both")))
        for r in rows
    ]  # fmt: skip
    told = (
        "Gradient of the keys before the first step, through H, through U and in all, as norms over that of"
        " the exact solve's sum (mean over the layers of the deepest model; a random direction behind the"
        " readout's norm)."
    )
    head = ("steps", "gradient", "through H", "through U", "sum")
    return f"{told}\n\n{markdown_table(head, lines)}"


def draw(results: Sequence[Found], figure: "Figure") -> None:
    """Differences by variant, quality against steps and time, gradient norms."""
    figure.set_size_inches(12.5, 8.6)
    grid = figure.subplots(2, 2)
    _draw_differences(grid[0][0], results)
    _draw_steps(grid[0][1], results)
    _draw_norms(grid[1][0], results)
    _draw_first(grid[1][1], results)
    figure.suptitle("Ablations of the Gated KalmaNet layer: a decoder of bytes on Python sources")


def _draw_differences(axes: "Axes", results: Sequence[Found]) -> None:
    names = [v.name for v in VARIANTS if v.name != BASELINE and differences(results, v.name)]
    names.sort(key=lambda name: fmean(differences(results, name)))
    own = [r["loss"] for r in _rows(results, BASELINE) if r["loss"] is not None]
    if len(own) > 1:
        axes.axvspan(
            -stdev(own), stdev(own), color="0.9", label="± deviation of the baseline's seeds"
        )
        axes.legend(loc="lower right", fontsize=8)
    for y, name in enumerate(names):
        found = differences(results, name)
        axes.plot(found, [y] * len(found), "o", ms=4, color="#0072B2", alpha=0.5)
        axes.plot(fmean(found), y, "|", ms=13, mew=2, color="#0072B2")
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    ticks = [-0.1, -0.03, -0.01, -0.005, 0, 0.005, 0.01, 0.03, 0.1, 0.3, 1]
    top = max((max(differences(results, n)) for n in names), default=0.1)
    low = min((min(differences(results, n)) for n in names), default=0.0)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axes.set_xlim(min(-0.012, 1.3 * low), max(0.02, 1.5 * top))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="held-out loss minus the baseline's, nats a byte", title="One part changed")
    axes.grid(alpha=0.25, axis="x")


def _draw_steps(axes: "Axes", results: Sequence[Found]) -> None:
    trained = []
    for steps, name in _TRAINED.items():
        losses = [r["loss"] for r in _rows(results, name) if r["loss"] is not None]
        times = [r["ms"] for r in _rows(results, name) if r["ms"] is not None]
        if losses:
            trained.append((steps, fmean(losses), fmean(times) if times else None))
    axes.plot([t[0] for t in trained], [t[1] for t in trained], "o-", color="#0072B2",
              label="trained and read with so many steps")  # fmt: skip
    for steps, loss, ms in trained:
        if ms is not None:
            axes.annotate(f"{ms:.0f} ms", (steps, loss), fontsize=7, xytext=(3, 4),
                          textcoords="offset points")  # fmt: skip
    read = [r["read_with"] for r in _rows(results, BASELINE) if "read_with" in r]
    if read:
        at = [int(k) for k in read[0] if k.isdigit()]
        means = []
        for k in at:
            good = [x[str(k)] for x in read if x[str(k)] is not None]
            means.append(fmean(good) if good else float("nan"))
        axes.plot(at, means, "s--", color="#E69F00", label="trained with 30, read with so many")
    derived = [r["loss"] for r in _rows(results, DERIVED.name) if r["loss"] is not None]
    if derived:
        axes.plot([3], [fmean(derived)], "*", ms=12, color="#009E73", label=DERIVED.name)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(at_ := [0, 1, 2, 3, 5, 8, 15, 30, 60], [str(x) for x in at_])
    axes.minorticks_off()
    axes.set(xlabel="Chebyshev steps", ylabel="held-out loss, nats a byte",
             title="Quality against steps, with the time of a training step")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _draw_norms(axes: "Axes", results: Sequence[Found]) -> None:
    for name, (label, color) in _CURVES.items():
        rows = [r for r in _rows(results, name) if r["seed"] == 0]
        if rows:
            norms = [float("nan") if x is None else x for x in rows[0]["norms"]]
            axes.semilogy(range(1, len(norms) + 1), norms, color=color, label=label, lw=1.2)
    axes.axhline(1, color="0.5", lw=0.8, ls=":")
    axes.set(xlabel="training step", ylabel="gradient norm before clipping to 1",
             title="Gradients in training, seed 0")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _draw_first(axes: "Axes", results: Sequence[Found]) -> None:
    rows = [row for r in results if "first" in r for row in r["first"]]
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "First gradients are not measured in this run.", ha="center")
        return
    depths = list(dict.fromkeys(row["layers"] for row in rows))
    for number, depth in enumerate(depths):
        shade = 0.35 + 0.65 * (number + 1) / len(depths)
        for kind, line, color in (("implicit", "o-", "#D55E00"), ("iteration", "^--", "#009E73")):
            here = [row for row in rows if row["layers"] == depth]
            norms = [float("nan") if row[kind] is None else row[kind] for row in here]
            axes.loglog([row["steps"] for row in here], norms, line, color=color, alpha=shade, ms=4,
                        label=f"{depth} layers, {kind}")  # fmt: skip
    axes.set_xticks(at := [1, 2, 3, 5, 8, 12, 30], [str(x) for x in at])
    axes.minorticks_off()
    axes.set(xlabel="Chebyshev steps", ylabel="gradient norm before training",
             title="The exact solve's gradient at few steps, and the steps' own")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncols=2)
