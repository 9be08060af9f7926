"""The tables and the figure of `mqar`."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import Found
from gka.experiments.reproduce.mqar_groups import (
    GATES,
    OURS,
    SOLVED,
    Group,
    Groups,
    decisive,
    groups_of,
    members,
    name_of,
    settings_of,
    shown_settings,
    size_of,
    smallest,
    why_not_shown,
)
from gka.experiments.reproduce.mqar_models import MIXERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def table(results: Sequence[Found]) -> str:
    """Where each mixer solves each setting; accuracies; orders; equal bytes; every model's trainings."""
    groups = groups_of(results)
    parts = [
        "Share of test queries answered right, mean over seeds ± half of its 95 % interval (Student's t); one"
        f" number: one seed. Solved: {SOLVED} and more. Two layers of one head, K = V = width unless said"
        " otherwise, a short convolution of four tokens in every mixer. State: the memory of both layers for"
        " one sequence in float32; attention's grows with the tokens. What does not solve a setting is"
        " marked with the number of learning rates that it has had.",
        _gates(groups),
        "## Where a setting is solved\n\n" + _solving(groups),
        *(_setting(groups, setting) for setting in settings_of(groups)),
        _equal(groups),
        "## Trainings\n\n" + _trainings(groups),
    ]
    return "\n\n".join(part for part in parts if part)


def _gates(groups: Groups) -> str:
    """Settings that are not shown, with the reason; what stands behind the others."""
    reasons = {s: why_not_shown(groups, s) for s in settings_of(groups)}
    lines = [f"- **Not shown**, {name_of(s)}: {reason}." for s, reason in reasons.items() if reason]
    told = "Baselines that must solve what their authors show, else the setting decides nothing: "
    told += "; ".join(
        f"{MIXERS[g.mixer].style[0]} from width {g.least_width} on ({g.source})" for g in GATES
    )
    return "\n".join([told + ".", *([""] if lines else []), *lines])


def _solving(groups: Groups) -> str:
    """The smallest width and the fewest bytes by mixer and setting."""
    settings = shown_settings(groups)
    rows = []
    for mixer in MIXERS:
        row = []
        for setting in settings:
            measured = members(groups, setting, mixers=(mixer,))
            best = smallest(groups, setting, mixer)
            if not measured:
                row.append("not measured")
            elif best is None:
                row.append(f"not up to {max(g.width for g in measured)}")
            else:
                row.append(f"{best.width}, {size_of(best.bytes)}")
        if any(x != "not measured" for x in row):
            rows.append((MIXERS[mixer].style[0], *row))
    head = ("smallest width that solves, and its state", *(name_of(s) for s in settings))
    return markdown_table(head, rows) if rows else "No setting is shown yet."


def _setting(groups: Groups, setting: tuple[int, int]) -> str:
    """Accuracies by mixer and width, and the order at decisive widths."""
    there = members(groups, setting)
    widths = sorted({g.width for g in there})
    rows = []
    for mixer in dict.fromkeys(g.mixer for g in there):
        by_width = {g.width: g for g in there if g.mixer == mixer}
        shown = (_told(by_width[w]) if w in by_width else "" for w in widths)
        rows.append((MIXERS[mixer].style[0], *shown))
    head = ("mixer", *(f"width {w}" for w in widths))
    reason = why_not_shown(groups, setting)
    title = f"## {name_of(setting)}" + ("" if reason is None else " (decides nothing: see above)")
    orders = [_order(groups, setting, width) for width in decisive(groups, setting)]
    return "\n\n".join([title, markdown_table(head, rows), *orders])


def _told(group: Group) -> str:
    """Accuracy and state bytes; of a model that does not solve its setting the number of rates tried."""
    rates = len(group.search)
    tried = "" if group.solved else f"; {rates} rate{'s' if rates > 1 else ''}"
    return f"{group} ({size_of(group.bytes)}{tried})"


def _order(groups: Groups, setting: tuple[int, int], width: int) -> str:
    """Mixers of a width from best to worst; "=" where the intervals of neighbours overlap."""
    there = sorted((g for g in members(groups, setting) if g.width == width), key=lambda g: -g.mean)
    text = f"Width {width}: {there[0].label} {there[0]}"
    for before, g in itertools.pairwise(there):
        margins = before.margin, g.margin
        known = None not in margins
        apart = known and before.mean - g.mean > sum(m for m in margins if m is not None)
        text += f" {'>' if apart else '=' if known else '≥'} {g.label} {g}"
    return text + ". (`=`: the intervals overlap; `≥`: one seed.)"


def _equal(groups: Groups) -> str:
    """GKA beside the others with as many state bytes, where they were trained."""
    rows = []
    for setting in settings_of(groups):
        for wide in (g for g in members(groups, setting, None) if g.expand > 1):
            ours = groups.get((*setting, "gka", wide.width, 1))
            narrow = groups.get((*setting, wide.mixer, wide.width, 1))
            if ours is not None and narrow is not None:
                rows.append((name_of(setting), wide.width, size_of(wide.bytes), str(ours), wide.label,
                             str(wide), f"{narrow} ({size_of(narrow.bytes)})"))  # fmt: skip
    if not rows:
        return ""
    head = ("setting", "width", "state of both", "GKA", "the other", "its accuracy", "with V = K")
    return "## At equal state bytes\n\n" + markdown_table(head, rows)


def _trainings(groups: Groups) -> str:
    """Every model's best rate, seeds and steps."""
    rows = []
    for setting in settings_of(groups):
        for g in members(groups, setting, None):
            tried = ", ".join(
                f"{rate:.2g}: {r['validation']:.2f}" for rate, r in sorted(g.search.items())
            )
            edge = " (edge of the search)" if g.at_edge else ""
            seeds = ", ".join(f"{r['test']:.3f} in {r['steps']}" for r in g.runs)
            rows.append((name_of(setting), g.label, g.width, g.runs[0]["parameters"],
                         f"{g.rate:.2g}{edge}", tried, seeds))  # fmt: skip
    head = ("setting", "mixer", "width", "weights", "best rate", "validation by rate, first seed",
            "test by seed, in steps")  # fmt: skip
    return markdown_table(head, rows)


def draw(results: Sequence[Found], figure: "Figure") -> None:
    """A column a shown setting: accuracy against width, and against state bytes."""
    groups = groups_of(results)
    settings = (shown_settings(groups) or settings_of(groups))[:4]
    figure.set_size_inches(max(3.6 * len(settings) + 0.6, 6.4), 7.4)
    grid = figure.subplots(2, len(settings), sharey=True, squeeze=False)
    for column, setting in enumerate(settings):
        there = members(groups, setting)
        for mixer in dict.fromkeys(g.mixer for g in there):
            line = [g for g in there if g.mixer == mixer]
            _line(grid[0][column], line, [g.width for g in line])
            _line(grid[1][column], line, [g.bytes / 1024 for g in line])
        grid[0][column].set(title=name_of(setting), xlabel="width = K = V")
        grid[1][column].set(xlabel="state, KiB (both layers, float32)")
        for axes in grid[:, column]:
            _finish(axes)
    for row in grid:
        row[0].set_ylabel("queries answered right")
    handles = {
        t: h for axes in grid[0] for h, t in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(3, 2 * len(settings)),
    )
    figure.suptitle("Multi-query associative recall, two layers, short convolutions in every mixer")


def _line(axes: "Axes", line: Sequence[Group], x: Sequence[float]) -> None:
    label, color, marker = MIXERS[line[0].mixer].style
    ours = line[0].mixer in OURS
    axes.errorbar(x, [g.mean for g in line], [g.margin or 0.0 for g in line], color=color, marker=marker,
                  label=label, lw=2.2 if ours else 1.4, ms=6, capsize=2, elinewidth=0.8,
                  zorder=3 if ours else 2)  # fmt: skip


def _finish(axes: "Axes") -> None:
    from matplotlib.ticker import FixedLocator

    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.05)
    axes.axhline(SOLVED, color="0.6", lw=0.8, ls=(0, (2, 2)))
    ticks = sorted({float(x) for container in axes.containers for x in container[0].get_xdata()})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
