"""The figure of `language`: six panels, the same colour for a mixer in each."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from gka.evaluation.plots import MIXER_STYLES
from gka.experiments.reproduce.experiment import Found
from gka.experiments.reproduce.language_table import (
    ATTENTION,
    accuracy,
    groups,
    label,
    loss,
    nearest,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Group = Sequence[Found]
Groups = Mapping[str, Group]
SLICES = ("all", "new", "repeated", "recalled", "far")


def draw(results: Sequence[Found], figure: "Figure") -> None:
    """Losses by slice, tasks by length and depth, losses by position, utility, accuracy by state."""
    figure.set_size_inches(13.5, 8.2)
    grid = figure.subplots(2, 3)
    small = {mixer: g for (size, mixer), g in groups(results).items() if size == "small"}
    _slices(grid[0][0], small)
    _lengths(grid[0][1], small, "needle-keys")
    _depths(grid[0][2], small, "needle-keys")
    _positions(grid[1][0], small)
    _utility(grid[1][1], small)
    _states(grid[1][2], small)
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    first = results[0]["training"]
    seeds = max(map(len, small.values()), default=0)
    figure.suptitle(
        f"Language models of {first['parameters'] / 1e6:.1f} M parameters and"
        f" {first['tokens'] / 1e6:.1f} M tokens of local text, sequences of {results[0]['length']}; lines:"
        f" mean of up to {seeds} seeds, shades: range"
    )


def _style(mixer: str) -> dict[str, Any]:
    """Colour and marker of the mixer; hybrids dashed and hollow."""
    _, color, marker = MIXER_STYLES[mixer.removesuffix(ATTENTION)]
    hybrid = mixer.endswith(ATTENTION)
    return {
        "color": color, "marker": marker, "ls": "--" if hybrid else "-", "ms": 5, "lw": 1.6,
        "mfc": "none" if hybrid else color, "label": label(mixer),
    }  # fmt: skip


def _line(
    axes: "Axes",
    mixer: str,
    group: Group,
    xs: Sequence[float],
    of: Callable[[Found], Sequence[Any]],
) -> None:
    """Mean over seeds, and their range as a shade."""
    rows = [of(r) for r in group]
    columns = [[x for x in column if x is not None] for column in zip(*rows, strict=True)]
    known = [(x, column) for x, column in zip(xs, columns, strict=True) if column]
    if not known:
        return
    places = [x for x, _ in known]
    style = _style(mixer)
    axes.plot(places, [fmean(c) for _, c in known], **style)
    if len(group) > 1:
        low, high = [min(c) for _, c in known], [max(c) for _, c in known]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.15, lw=0)


def _slices(axes: "Axes", small: Groups) -> None:
    """Loss of the memory part by slice, minus GKA's mean, or that of the first mixer there is."""
    base = "gka" if "gka" in small else next(iter(small))
    zero = [fmean([loss(r, "memory", s) or 0 for r in small[base]]) for s in SLICES]
    for mixer, group in small.items():

        def of(r: Found) -> list[float | None]:
            found = [loss(r, "memory", s) for s in SLICES]
            return [None if x is None else x - z for x, z in zip(found, zero, strict=True)]

        _line(axes, mixer, group, range(len(SLICES)), of)
    axes.set_xticks(range(len(SLICES)), SLICES)
    axes.set(title="Held-out loss by what the context holds", ylabel=f"nats above {label(base)}")
    axes.grid(alpha=0.25)


def _lengths(axes: "Axes", small: Groups, task: str) -> None:
    for mixer, group in small.items():
        lengths = sorted({r["length"] for r in group[0]["tasks"]})
        _line(axes, mixer, group, lengths, lambda r, n=lengths: [accuracy(r, task, i) for i in n])
    _tokens(axes, next(iter(small.values()))[0]["length"])
    axes.set(
        title=f"{task}: one of four codes, by length", ylabel="answers right", ylim=(-0.03, 1.03)
    )


def _depths(axes: "Axes", small: Groups, task: str) -> None:
    for mixer, group in small.items():
        near = nearest(group[0])
        depths = sorted({r["depth"] for r in group[0]["tasks"] if r["task"] == task})

        def of(r: Found, near: int = near, depths: list[float] = depths) -> list[float]:
            found = {
                row["depth"]: row["tokens_right"]
                for row in r["tasks"]
                if row["task"] == task and row["length"] == near
            }
            return [found[d] for d in depths]

        _line(axes, mixer, group, depths, of)
    axes.set(title=f"{task}, {nearest(next(iter(small.values()))[0]):,} tokens, by depth",
             xlabel="place of the code, 0: beginning", ylabel="digits right", ylim=(-0.03, 1.03))  # fmt: skip
    axes.grid(alpha=0.25)


def _positions(axes: "Axes", small: Groups) -> None:
    for mixer, group in small.items():
        stops = [row["stop"] for row in group[0]["positions"]]
        _line(axes, mixer, group, stops, lambda r: [row["loss"] for row in r["positions"]])
    _tokens(axes, next(iter(small.values()))[0]["length"])
    low = min(row["loss"] for g in small.values() for row in g[0]["positions"])
    axes.set(title="Loss by position, to 8 times the training length", ylabel="nats a token")
    axes.set_ylim(low - 0.1, low + 2.0)
    axes.set_xlabel("tokens up to which")


def _utility(axes: "Axes", small: Groups) -> None:
    for mixer, group in small.items():
        resets = [row["reset"] for row in group[0]["utility"]["rows"]]
        _line(
            axes, mixer, group, resets, lambda r: [row["repeated"] for row in r["utility"]["rows"]]
        )
    _tokens(axes, next(iter(small.values()))[0]["length"])
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set(title="What older memory is worth, repeated tokens",
             xlabel="tokens left by a reset", ylabel="nats lost by the reset")  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_yticks([0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _states(axes: "Axes", small: Groups) -> None:
    """Loss on recalled tokens against the bytes of the state at the training length."""
    for mixer, group in small.items():
        size = next(iter(group[0]["state_bytes"].values())) / 2**20
        style = _style(mixer) | {"ls": "none", "ms": 8}
        values = [x for r in group if (x := loss(r, "memory", "recalled")) is not None]
        axes.plot([size] * len(values), values, **style)
    axes.set(title="Loss on recalled tokens against the state", xlabel="state of a sequence, MiB",
             ylabel="nats a token")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)


def _tokens(axes: "Axes", length: int) -> None:
    """A logarithmic axis of tokens with a mark at the training length."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
    axes.axvline(length, color="0.6", lw=0.8, ls=(0, (2, 2)))
    axes.grid(alpha=0.25)
    axes.set_xlabel("tokens")
