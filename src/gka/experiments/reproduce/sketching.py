"""`sketching`: solving in d of K dimensions: what it costs, and what it gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import (
    Cell,
    Check,
    Experiment,
    Found,
    Options,
    at_least,
    at_most,
)
from gka.experiments.reproduce.sketch_speed import Shape
from gka.experiments.reproduce.sketch_speed import measure as measure_speed
from gka.experiments.reproduce.sketched_models import (
    BASES,
    KEYS,
    Training,
    measure_keys,
    measure_plain,
    measure_trained,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = 58.89 / 57.57
"""The paper's mean accuracies without a sketch and with one of 32 of 128 dimensions, at 2.8B."""
ON_GPU = Shape(8, 2048, 8, 128, 0.3)
_COLORS = {
    "white": "#999999",
    "SiLU": "#D55E00",
    "decaying spectrum": "#0072B2",
    "trained": "#000000",
}
_HOW = {"learned": ("#009E73", "P"), "fixed": ("#CC79A7", "D")}


@dataclass(frozen=True)
class Size:
    """`systems` systems of untrained keys of size `dim`, models, and the op's shape on a CPU.

    `eighths`: d as eighths of K, for models and speed; untrained keys have K/16, too.
    """

    systems: int
    dim: int
    training: Training
    speed: Shape
    eighths: tuple[int, ...] = (1, 2, 4)


def cells(size: Size, options: Options) -> list[Cell]:
    """Of untrained keys and models for each seed; speed once, first on a GPU, whose time is dear."""
    device, speed = options.device, size.speed
    if device.startswith("cuda") and size.dim > 8:  # not in smoke form
        speed = ON_GPU
    times = [
        Cell(
            f"speed, {'plain' if d is None else f'd = {d}'}, {'with' if mixed else 'without'} alpha",
            partial(measure_speed, speed, d, device, mixed),
            2 + 4 * speed.seconds,
        )
        for mixed in (True, False)
        for d in (None, *_dims(size, speed.dim))
    ]
    keys, models = _key_cells(size, options), _model_cells(size, options)
    return [*times, *models, *keys] if device.startswith("cuda") else [*keys, *models, *times]


def _key_cells(size: Size, options: Options) -> list[Cell]:
    dims = _dims(size, size.dim)
    dims = (size.dim // 16, *dims) if size.dim >= 16 else dims
    seconds = 1e-7 * size.systems * size.dim**3
    return [
        Cell(
            f"{kind} keys, seed {seed}",
            partial(measure_keys, kind, size.systems, size.dim, dims, seed),
            seconds,
        )
        for seed in options.seeds
        for kind in KEYS
    ]


def _model_cells(size: Size, options: Options) -> list[Cell]:
    training, dims = size.training, _dims(size, size.training.dim)
    seconds = 10 + training.steps * (
        0.1 + 4e-8 * training.batch * training.length * training.width**2
    )
    ways = [("learned", d) for d in dims]
    if len(dims) > 1:  # not in smoke form
        ways += [("gla", None), ("fixed", dims[len(dims) // 2])]
    found: list[Cell] = []
    for seed in options.seeds:
        plain = partial(measure_plain, training, dims, seed, options.device)
        found.append(Cell(f"trained plain, seed {seed}", plain, 1.5 * seconds))
        for how, d in ways:
            run = partial(measure_trained, training, how, d, seed, options.device)
            told = how if d is None else f"{how}, d = {d}"
            found.append(Cell(f"trained {told}, seed {seed}", run, seconds))
    return found


def _dims(size: Size, dim: int) -> tuple[int, ...]:
    return tuple(dim * eighths // 8 for eighths in size.eighths)


def _of(results: Sequence[Found], of: str, **where: Any) -> list[Found]:
    return [r for r in results if r["of"] == of and all(r[k] == v for k, v in where.items())]


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None without values or where one was not finite."""
    return None if not values or None in values else mean(x for x in values if x is not None)


def _error(results: Sequence[Found], keys: str, basis: str, eighths: float) -> float | None:
    """Mean over seeds of the error on those keys at d = K * eighths / 8."""
    found = []
    for r in _of(results, "keys", keys=keys):
        if (d := round(r["dim"] * eighths / 8)) in r["dims"]:
            found.append(r["errors"][basis][r["dims"].index(d)])
    return _mean(found)


def _loss(results: Sequence[Found], how: str, sketch: int | None = None) -> float | None:
    """Mean over seeds of the loss: "plain", an untrained basis, or a way of training."""
    if how in BASES:
        plain = _of(results, "plain")
        return _mean(
            [r["losses"][how][r["dims"].index(sketch)] for r in plain if sketch in r["dims"]]
        )
    where: dict[str, Any] = {} if how == "plain" else {"how": how, "sketch": sketch}
    return _mean(
        [r["loss"] for r in _of(results, "plain" if how == "plain" else "trained", **where)]
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _model_dims(results: Sequence[Found]) -> list[int]:
    return sorted({d for r in _of(results, "plain") for d in r["dims"]})


def _time(results: Sequence[Found], sketch: int | None, mixed: bool, what: str) -> float | None:
    found = _of(results, "speed", sketch=sketch, mixed=mixed)
    return found[0]["times"][what][0] if found else None


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(results: Sequence[Found]) -> str:
    """Errors by keys, losses by model, and times."""
    parts = [_key_table(results), _loss_table(results), _speed_table(results)]
    return "\n\n".join(part for part in parts if part)


def _key_table(results: Sequence[Found]) -> str:
    rows = []
    for kind in KEYS:
        there = _of(results, "keys", keys=kind)
        for place, d in enumerate(there[0]["dims"] if there else ()):
            pairs = (_mean([r["errors"][b][place] for r in there]) for b in BASES)
            energy = _mean([r["energy"][place] for r in there])
            rows.append((kind, there[0]["dim"], d, *map(_shown, (*pairs, energy))))
    plain = _of(results, "plain")
    for place, d in enumerate(plain[0]["dims"] if plain else ()):
        pairs = (_mean([r[f"errors, {b}"][place] for r in plain]) for b in BASES)
        energy = _mean([r["energy"][place] for r in plain])
        rows.append(("trained", plain[0]["dim"], d, *map(_shown, (*pairs, energy))))
    if not rows:
        return ""
    head = ("keys", "K", "d", "random S", "spectral S", "energy inside spectral S")
    return (
        "Error |S x' − x| / |x| in the norm of H, exact solves: that of the readout if values are independent;"
        " 1 is no readout at all. The spectral basis is that of other streams (untrained keys) or other text"
        f" (trained model, per head). Mean over seeds.\n\n{markdown_table(head, rows)}"
    )


def _loss_table(results: Sequence[Found]) -> str:
    plain = _loss(results, "plain")
    rows = [("plain, all of K", "-", _shown(plain, 4), "1.0000")] if plain else []
    ways = [
        ("random S, not trained with it", "random"),
        ("spectral S, not trained with it", "spectral"),
        ("trained with a learned S", "learned"),
        ("trained with a fixed random S", "fixed"),
    ]
    for told, how in ways:
        for d in _model_dims(results):
            if (loss := _loss(results, how, d)) is not None:
                rows.append((told, str(d), _shown(loss, 4), _shown(_ratio(loss, plain), 4)))
    if (loss := _loss(results, "gla")) is not None:
        rows.append(
            ("trained without a solve (gla)", "-", _shown(loss, 4), _shown(_ratio(loss, plain), 4))
        )
    if not rows:
        return ""
    seeds = len({r["seed"] for r in results if "loss" in r})
    head = ("model", "d", "held-out bits per byte", "over plain")
    return f"Small language models, mean over {seeds} seeds.\n\n{markdown_table(head, rows)}"


def _speed_table(results: Sequence[Found]) -> str:
    rows = []
    for r in _of(results, "speed"):
        base = _of(results, "speed", sketch=None, mixed=r["mixed"])
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
    batch, length, heads, dim = _of(results, "speed")[0]["shape"]
    head = ("d", "alpha", "backend", "forward, ms", "forward + backward, ms", "decode, ms",
            "forward over plain", "both", "decode", "FLOPs over plain", "state bytes",
            "learned S, both ways, ms", "widest spread")  # fmt: skip
    return (
        f"The op on {_of(results, 'speed')[0]['device']}: {batch} × {length} tokens, {heads} heads of K = V ="
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
        axes.legend(fontsize=7)
    figure.suptitle("Solving in d of K dimensions: (SᵀHS + λI) x' = Sᵀq, x = S x'")


def _draw_errors(results: Sequence[Found], axes: Any) -> None:
    curves = {kind: _of(results, "keys", keys=kind) for kind in KEYS}
    curves["trained"] = _of(results, "plain")
    for name, there in curves.items():
        if not there:
            continue
        shares = [d / there[0]["dim"] for d in there[0]["dims"]]
        for basis, line, marker in (("random", ":", "x"), ("spectral", "-", "o")):
            errors = [
                r[f"errors, {basis}"] if name == "trained" else r["errors"][basis] for r in there
            ]
            means = [_mean(column) for column in zip(*errors, strict=True)]
            axes.plot(shares, means, line, color=_COLORS[name], marker=marker, ms=5,
                      label=f"{name} keys, {basis} S")  # fmt: skip
    axes.set(xlabel="d / K", ylabel="error of the readout", title="Sketched against whole solution",
             ylim=(0, 1.05))  # fmt: skip


def _draw_losses(results: Sequence[Found], axes: Any) -> None:
    dims = _model_dims(results)
    for basis, line in (("random", ":"), ("spectral", "-")):
        losses = [_loss(results, basis, d) for d in dims]
        axes.plot(dims, losses, line, color="#000000", marker="x" if basis == "random" else "o", ms=5,
                  label=f"trained whole, then {basis} S")  # fmt: skip
    for how, (color, marker) in _HOW.items():
        found = [(d, loss) for d in dims if (loss := _loss(results, how, d)) is not None]
        name = "learned" if how == "learned" else "fixed random"
        axes.plot(*zip(*found, strict=True) if found else ([], []), color=color, marker=marker, ms=6,
                  label=f"trained with {name} S")  # fmt: skip
    for how, label, color in (
        ("plain", "whole solve", "#0072B2"),
        ("gla", "no solve (gla)", "#999999"),
    ):
        if (loss := _loss(results, how)) is not None:
            axes.axhline(loss, color=color, ls="--", label=label)
    axes.set(
        xlabel="d", ylabel="held-out bits per byte", title="Small language models", xticks=dims
    )


def _draw_speed(results: Sequence[Found], axes: Any) -> None:
    dims = sorted({r["sketch"] for r in _of(results, "speed") if r["sketch"] is not None})
    for mixed, color in ((True, "#0072B2"), (False, "#D55E00")):
        told = "with α" if mixed else "without α"
        for what, line in (("forward", "-"), ("both ways", "--")):
            base = _time(results, None, mixed, what)
            ratios = [_ratio(_time(results, d, mixed, what), base) for d in dims]
            label = f"time {'forward' if what == 'forward' else 'forward + backward'}, {told}"
            axes.plot(dims, ratios, line, color=color, marker="o", ms=5, label=label)
        plain = _of(results, "speed", sketch=None, mixed=mixed)
        found = [r["flops"] / plain[0]["flops"] for d in dims if plain
                 for r in _of(results, "speed", sketch=d, mixed=mixed)]  # fmt: skip
        if len(found) == len(dims):
            axes.plot(dims, found, ":", color=color, label=f"FLOPs, {told}")
    axes.axhline(1.0, color="#999999", lw=0.8)
    axes.set(
        xlabel="d", ylabel="over the plain op", title="The op's time and arithmetic", xticks=dims
    )
    axes.set_ylim(bottom=0)


def checks(results: Sequence[Found]) -> list[Check]:
    """The paper's loss of 2.2 % at d = K/4, the memory without a solve, and what we predicted."""
    dims = _model_dims(results)
    quarter = dims[len(dims) // 2] if dims else None
    plain, gla = _loss(results, "plain"), _loss(results, "gla")
    learned, fixed, random, spectral = (
        _loss(results, how, quarter) for how in ("learned", "fixed", "random", "spectral")
    )
    sketch = max((r["sketch"] or 0 for r in _of(results, "speed")), default=0) // 2
    times = [_time(results, s, False, "both ways") for s in (sketch, None)]
    lost = [None if x is None or plain is None else x - plain for x in (spectral, random)]
    return [
        at_most("claim", "trained with a learned S at d = K/4: held-out loss over the plain model's at most"
                f" {PAPER:.3f}, the paper's ratio of accuracies", _ratio(learned, plain), PAPER),
        at_most("claim", "the same over the loss of a model without a solve (gla): below 1",
                _ratio(learned, gla), 0.99999),
        at_most("prediction", "a trained model sketched at d = K/4 by spectral S, without training: loss over"
                " the plain model's at most 1.022", _ratio(spectral, plain), 1.022),
        at_most("prediction", "what it loses over what random S loses: at most 0.5", _ratio(*lost), 0.5),
        at_most("prediction", "trained at d = K/4, learned S against a fixed random one: losses within 1 %",
                None if learned is None or not fixed else abs(learned / fixed - 1), 0.01),
        at_least("prediction", "white keys, d = K/2: error of spectral S 0.5 or more, for no direction is"
                 " spare", _error(results, "white", "spectral", 4), 0.5),
        at_most("prediction", "keys of a decaying spectrum, d = K/4: error of spectral S over random S at most"
                " 0.6", _ratio(_error(results, "decaying spectrum", "spectral", 2),
                               _error(results, "decaying spectrum", "random", 2)), 0.6),
        at_most("prediction", "the op without alpha at d = K/4, forward and backward: at most 0.6 of the plain"
                " op's time", _ratio(*times), 0.6),
    ]  # fmt: skip


SKETCHING = Experiment(
    name="sketching",
    title="solving in d of K dimensions",
    claim="A solve in d = K/4 dimensions through a map and its transpose costs little quality: 57.57 of 58.89"
    " with 32 of 128 dimensions.",
    source="arXiv 2511.21016, appendix H",
    prediction="A trained model's keys leave most directions nearly unused, so the leading eigenvectors of its"
    " mean H_t serve at d = K/4 without training (loss at most 2.2 % above the plain model's) and lose at most"
    " half of what random maps lose. Trained with the sketch, a learned map gains nothing over a fixed random"
    " one (within 1 %), since projections turn queries and keys into any span. White keys have no spare"
    " direction: errors of 0.5 and more even at K/2. Without the mix gate the op takes at most 0.6 of the"
    " plain one's time at K/4; with it the whole U remains and the gain is smaller.",
    refuted_by="spectral maps that cost more than 2.2 %, or more than half of what random ones cost; learned"
    " maps better than fixed ones by more than 1 %; white keys sketched to K/2 with an error below 0.5; an op"
    " without alpha above 0.6 of the plain time.",
    version=1,
    sizes={
        "smoke": Size(
            2,
            8,
            Training(16, 1, 1, 8, 32, 2, 2, 4, package="json"),
            Shape(1, 70, 1, 16, 1e-3),
            (4,),
        ),
        "quick": Size(32, 64, Training(64, 2, 2, 32, 128, 8, 300, 200), Shape(1, 512, 2, 128, 1.0)),
        "full": Size(
            64, 128, Training(128, 2, 4, 32, 256, 2, 1300, 100), Shape(1, 2048, 2, 128, 5.0)
        ),
    },
    seeds={"smoke": 1, "quick": 1, "full": 3},
    cells=cells,
    table=table,
    draw=draw,
    checks=checks,
)
