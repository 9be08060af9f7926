"""Table and figure of `hybrid`."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from gka.evaluation.plots import MIXER_STYLES
from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# by choice: in words, line, colour of the marks' faces (None: the line's)
_LINES = {"rank": ("rank", "-", None), "alternate": ("alternation", (0, (4, 2)), "white")}
_NAMES = {"teacher": "Transformer", "control": "Transformer, trained on"}


def _groups(results: Sequence[Found]) -> dict[tuple[str, str, float, str], list[Found]]:
    """Cells by model; each group holds its seeds."""
    found: dict[tuple[str, str, float, str], list[Found]] = {}
    for r in results:
        found.setdefault((r["kind"], r["mixer"], r["replaced"], r["choice"]), []).append(r)
    return found


def _mean(group: Sequence[Found], *path: Any) -> float | None:
    """Mean over seeds of a figure by its keys; None if one has none."""
    values: list[Any] = list(group)
    for key in path:
        values = [value[key] for value in values]
    return None if None in values else fmean(values)


def _point(group: Sequence[Found], *path: Any) -> float:
    """`_mean` for a figure, which leaves out NaN."""
    mean = _mean(group, *path)
    return math.nan if mean is None else mean


def _needle(group: Sequence[Found], length: int, keys: int) -> float:
    """Mean share of copied characters."""
    return fmean(
        x["copied"]
        for r in group
        for x in r["needles"]
        if (x["length"], x["keys"]) == (length, keys)
    )


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(results: Sequence[Found]) -> str:
    """A row for each model, means over seeds."""
    length, seeds = results[0]["length"], len({r["seed"] for r in results})
    most = max(x["keys"] for x in results[0]["needles"])
    rows = [
        (
            *_named(key),
            _shown(_mean(group, "slices", "all", "loss"), 4),
            *(
                _shown(_mean(group, "slices", s, "accuracy"))
                for s in ("repeated", "recalled", "far")
            ),
            *(_shown(_needle(group, at * length, most), 2) for at in (1, 4)),
            _shown(_mean(group, "positions", -1, "loss")),
            " / ".join(_megabytes(group, t) for t in ("2048", "32768")),
            f"{_mean(group, 'training'):,.0f}",
            f"{_mean(group, 'reading'):,.0f}",
        )
        for key, group in _groups(results).items()
    ]
    head = ("model", "replaced", "loss", "repeated", "recalled", "far", f"needle, {length}",
            f"needle, {4 * length}", f"loss, {2 * length} to {4 * length}", "MB at 2k / 32k",
            "trained, tokens/s", "read, tokens/s")  # fmt: skip
    sizes = {k: int(v["tokens"]) for k, v in results[0]["slices"].items()}
    return (
        f"Held-out bytes of Python's standard library, means over {seeds} seed{'s' * (seeds > 1)}. loss: nats"
        f" a byte, blocks of {length}. Accuracies: repeated bytes ({sizes['repeated']:,} of"
        f" {sizes['all']:,}: the 8-gram that they end occurred before in the block), recalled ones"
        f" ({sizes['recalled']:,}: and not in the training text), far ones ({sizes['far']:,}: recalled, last"
        f" seen {length // 4} bytes ago or more). needle: share of a planted value's characters that are"
        f" copied, {most} keys in a text of so many bytes (guessing: 0.1). MB: keys, values and states of a"
        f" sequence.\n\n{markdown_table(head, rows)}\n\n{_layers(results)}"
    )


def _named(key: tuple[str, str, float, str]) -> tuple[str, str]:
    kind, mixer, replaced, choice = key
    if kind in _NAMES:
        return _NAMES[kind], "-"
    name = MIXER_STYLES[mixer][0] + ", from scratch" * (kind == "scratch")
    return name, f"{replaced:.0%}, {choice}"


def _megabytes(group: Sequence[Found], tokens: str) -> str:
    size = sum(group[0]["bytes"][tokens].values()) / 2**20
    return f"{size:.3g}"


def _layers(results: Sequence[Found]) -> str:
    """Which layers each choice replaced, and the Transformer's ranking."""
    lines = []
    for r in results:
        if r["kind"] == "teacher":
            rise = ", ".join(f"{layer} {x:+.3f}" for layer, x in r["rise"].items())
            lines.append(
                f"Seed {r['seed']}: rise of the Transformer's loss with a short window, by layer: {rise}."
            )
        elif r["kind"] == "hybrid" and r["mixer"] == "gka":
            layers = ", ".join(map(str, r["layers"]))
            lines.append(
                f"{r['replaced']:.0%} by {r['choice']}, seed {r['seed']}: layers {layers}."
            )
    return " ".join(lines)


def draw(results: Sequence[Found], figure: "Figure") -> None:
    """Loss and recall against the share of layers replaced; needles and loss by length."""
    figure.set_size_inches(11, 8.6)
    (loss, recall), (needles, places) = figure.subplots(2, 2)
    groups, length = _groups(results), results[0]["length"]
    _by_share(loss, groups, "all", "loss")
    _by_share(recall, groups, "recalled", "accuracy")
    loss.set(title="held-out loss", ylabel="nats a byte")
    recall.set(title="recall: bytes repeated in the text, never in training", ylabel="accuracy")
    _by_length(needles, places, groups)
    needles.axvline(length, color="0.6", lw=0.8, ls=":")
    needles.axhline(0.1, color="0.6", lw=0.8, ls=":")
    needles.text(length, 0.99, " training's length", color="0.4", fontsize="small", va="top")
    needles.text(4 * length, 0.11, "guessing", color="0.4", fontsize="small", ha="right")
    needles.set(title="needles: planted values copied, half of the layers by rank", ylim=(0, 1.03),
                xlabel="bytes of text", ylabel="share of characters")  # fmt: skip
    places.set(title="loss by place, half of the layers by rank", xlabel="place in the text, bytes",
               ylabel="nats a byte")  # fmt: skip
    for axes in (loss, recall, needles, places):
        axes.grid(alpha=0.25)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"A Transformer primed into hybrids, trained on blocks of {length} bytes")


def _by_length(needles: "Axes", places: "Axes", groups: dict) -> None:
    """Lines of the Transformer trained on and of the hybrids of half of the layers by rank."""
    for (kind, mixer, replaced, choice), group in groups.items():
        if kind != "control" and (kind, replaced, choice) != ("hybrid", 0.5, "rank"):
            continue
        _, color, marker = MIXER_STYLES[mixer]
        lengths = sorted({x["length"] for x in group[0]["needles"]})
        most = max(x["keys"] for x in group[0]["needles"])
        copied = [_needle(group, at, most) for at in lengths]
        needles.plot(lengths, copied, color=color, marker=marker)
        spans = [f"{p['from']} to {p['to']}" for p in group[0]["positions"]]
        losses = [_point(group, "positions", i, "loss") for i in range(len(spans))]
        places.plot(spans, losses, color=color, marker=marker)
    needles.set_xscale("log", base=2)
    needles.xaxis.set_major_formatter("{x:.0f}")


def _by_share(axes: "Axes", groups: dict, name: str, figure: str) -> None:
    """A line for each mixer and choice, from the Transformer trained on; stars: from scratch."""
    begin = groups.get(("control", "attention", 0.0, ""))
    teacher = groups.get(("teacher", "attention", 0.0, ""))
    for mixer in dict.fromkeys(key[1] for key in groups if key[0] == "hybrid"):
        label, color, marker = MIXER_STYLES[mixer]
        for choice, (said, line, face) in _LINES.items():
            where = ("hybrid", mixer, choice)
            points = {k[2]: g for k, g in groups.items() if (k[0], k[1], k[3]) == where}
            if not points:
                continue
            whole = points | ({0.0: begin} if begin else {})
            shares = sorted(whole)
            means = [_point(whole[x], "slices", name, figure) for x in shares]
            axes.plot([100 * x for x in shares], means, ls=line, color=color, marker=marker,
                      mfc=face or color, label=f"{label}, by {said}")  # fmt: skip
            for x, group in points.items():
                for r in group if len(group) > 1 else ():
                    axes.plot(100 * x, _point([r], "slices", name, figure), ".", color=color, ms=4)
        scratch = groups.get(("scratch", mixer, 0.5, "rank"))
        if scratch:
            axes.plot([50], [_point(scratch, "slices", name, figure)], "*", color=color, ms=12,
                      mec="black", mew=0.6, ls="", label=f"{label}, half, from scratch")  # fmt: skip
    if begin:
        axes.plot([0], [_point(begin, "slices", name, figure)], "s", color="black", zorder=3,
                  label="Transformer, trained on")  # fmt: skip
    if teacher:
        axes.axhline(_point(teacher, "slices", name, figure), color="0.5", lw=1, ls=":",
                     label="Transformer before")  # fmt: skip
    axes.set(xlabel="attention layers replaced (%)", xticks=[0, 25, 50, 75])
