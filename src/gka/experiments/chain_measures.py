"""The needle test of the chain, and its results as a table and a plot."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gka.errors import InputError
from gka.evaluation.plots import MIXER_STYLES
from gka.experiments.ledger import markdown_table
from gka.training.priming.report import TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DIGITS = 8


@dataclass(frozen=True)
class NeedleTest:
    """Texts with a value to copy from the context, for a tokenizer whose ids are bytes.

    A line such as  KEY_mfqa = '83917264'  is planted in held-out text, which ends with  assert KEY_mfqa ==
    '  and the value. One forward pass tells which characters of the value are the most likely ones given the
    previous characters, and for which values all are.

    Attributes:
        rows: token ids int64 [samples, context].
        places: characters of the value, which ends each row.
    """

    rows: torch.Tensor
    places: int

    @classmethod
    def drawn(
        cls,
        filler: Sequence[int],
        context: int,
        samples: int,
        encode: Callable[[str], list[int]],
        keys: int = 1,
    ) -> "NeedleTest":
        """`samples` texts of `context` tokens from `filler`, with needles at evenly spaced depths.

        Args:
            filler: ids of other text.
            context: tokens of a text.
            samples: number of texts.
            encode: text to ids.
            keys: keys in a text, each with a value; the other ones lie at random depths.

        Raises:
            InputError: `context` has no room for the lines, or `filler` is shorter than it.
        """
        source, rows = random.Random(context), []
        for number in range(samples):
            pairs = [_key_and_value(source) for _ in range(keys)]
            key, value = pairs[0]
            planted = [encode(f"\nKEY_{k} = '{v}'\n") for k, v in pairs]
            asked, answer = encode(f"\nassert KEY_{key} == '"), encode(value)
            room = context - sum(map(len, planted)) - len(asked) - len(answer)
            if not 0 <= room <= len(filler):
                raise InputError(
                    f"a text of {context} tokens with {keys} keys takes {room} tokens of filler; expected 0"
                    f" to {len(filler)}, which are given"
                )
            start = source.randrange(max(1, len(filler) - room))
            depths = [round(room * number / max(1, samples - 1))]
            depths += [source.randrange(room + 1) for _ in pairs[1:]]
            text = _laid(list(filler[start : start + room]), depths, planted)
            rows.append(text + asked + answer)
        return cls(torch.tensor(rows), DIGITS)

    @torch.no_grad()
    def run(self, model: Any, batch_size: int, autocast: Callable[[], Any]) -> tuple[float, float]:
        """Fraction of the values' characters that are copied, and of values that are copied completely."""
        device = next(model.parameters()).device
        right = []
        for rows in self.rows.to(device).split(batch_size):
            with autocast():
                logits = model(rows, logits_to_keep=self.places + 1, use_cache=False).logits
            right.append(logits[:, :-1].argmax(-1) == rows[:, -self.places :])
        found = torch.cat(right)
        return found.float().mean().item(), found.all(dim=1).float().mean().item()


def _key_and_value(source: random.Random) -> tuple[str, str]:
    """Four consonants and eight digits."""
    key = "".join(source.choices("bcdfghjklmnpqrstvwxz", k=4))
    return key, "".join(source.choices("0123456789", k=DIGITS))


def _laid(text: list[int], depths: Sequence[int], planted: Sequence[list[int]]) -> list[int]:
    """`text` with each of `planted` before the token of its depth."""
    order = sorted(range(len(planted)), key=lambda i: depths[i], reverse=True)
    for i in order:
        text = text[: depths[i]] + planted[i] + text[depths[i] :]
    return text


def markdown(found: dict[str, Any]) -> str:
    """A table with one row per phase of each hybrid, and the teacher once."""
    probes = sorted(
        {
            name
            for h in found["hybrids"].values()
            for p in h["phases"].values()
            for name in p["probe"]
        }
    )
    titles = ["hybrid", "phase", "loss", "perplexity", "bits per byte", "gap recovered", *probes]
    lines = []
    for number, (mixer, hybrid) in enumerate(found["hybrids"].items()):
        for phase, figures in hybrid["phases"].items():
            if phase == "teacher" and number:
                continue
            lines.append(
                _row("" if phase == "teacher" else MIXER_STYLES[mixer][0], phase, figures, probes)
            )
    if "control" in found:
        lines.append(["control", "teacher, stage 2 too", *_figures(found["control"], probes)])
    steps = ", ".join(f"{name} {count} steps" for name, count in found.get("steps", {}).items())
    spent, parameters = found["teacher"]["training"], found["teacher"]["model"]["parameters"]
    head = [
        f"Teacher: {parameters / 1e6:.1f} M parameters, {spent['steps']} steps, "
        f"{spent['tokens'] / 1e6:.1f} M tokens in {spent['seconds']:.0f} s. "
        f"Hybrids: {steps}, for both alike.",
        "",
    ]
    times = [
        f"{MIXER_STYLES[mixer][0]}: " + ", ".join(
            f"{name} {s['seconds']:.0f} s, {s['tokens_per_second']:,.0f} tokens a second"
            for name, s in hybrid["stages"].items()
        )
        for mixer, hybrid in found["hybrids"].items()
    ]  # fmt: skip
    return "\n".join([*head, markdown_table(titles, lines), "", *times]) + "\n"


def _row(mixer: str, phase: str, figures: dict[str, Any], probes: list[str]) -> list[str]:
    return [mixer, TITLES[phase], *_figures(figures, probes)]


def _figures(figures: dict[str, Any], probes: list[str]) -> list[str]:
    share = figures.get("recovered")
    row = [f"{figures['loss']:.4f}", f"{figures['perplexity']:.3f}"]
    row += [f"{figures['bits_per_byte']:.4f}", "-" if share is None else f"{share:.1%}"]
    return row + [f"{figures['probe'][name]:.3f}" for name in probes]


def draw(found: dict[str, Any], figure: "Figure") -> None:
    """Draw bits per byte and copied values by phase, and the losses of both stages."""
    figure.set_size_inches(11, 7.2)
    grid = figure.subplots(2, 2)
    for mixer, hybrid in found["hybrids"].items():
        phases = hybrid["phases"]
        names, style = list(phases)[1:], {"color": MIXER_STYLES[mixer][1], "marker": "o"}
        titles = [TITLES[name].replace("hybrid ", "") for name in names]
        bits = [phases[name]["bits_per_byte"] for name in names]
        grid[0][0].plot(titles, bits, label=MIXER_STYLES[mixer][0], **style)
        _draw_needles(grid[0][1], phases, titles, style | {"label": MIXER_STYLES[mixer][0]})
        for axes, stage in ((grid[1][0], "stage1"), (grid[1][1], "stage2")):
            rows = hybrid["stages"].get(stage, {"curves": {"training": []}})["curves"]["training"]
            axes.plot(
                [r["step"] for r in rows],
                [r["loss"] for r in rows],
                color=MIXER_STYLES[mixer][1],
                label=MIXER_STYLES[mixer][0],
            )
    _draw_teacher(grid, found)


def _draw_teacher(grid: Any, found: dict[str, Any]) -> None:
    """Draw the teacher's figures as lines, and the titles and legends of all panels."""
    teacher = next(iter(found["hybrids"].values()))["phases"]["teacher"]
    grid[0][0].axhline(teacher["bits_per_byte"], color="black", lw=1, label="teacher")
    for line, value in zip(("-", "--", ":"), _copied(teacher).values(), strict=False):
        grid[0][1].axhline(value, color="black", lw=1, ls=line)
    if "control" in found:
        bits = found["control"]["bits_per_byte"]
        grid[0][0].axhline(bits, color="0.5", lw=1, ls="--", label="teacher, stage 2 too")
    grid[1][1].axhline(teacher["loss"], color="black", lw=1, label="teacher, held out")
    grid[0][0].set(title="held-out text", ylabel="bits per byte")
    grid[0][1].set(
        title="planted values copied (black: teacher)", ylabel="share of characters", ylim=(0, 1.03)
    )
    grid[1][0].set(
        title="stage 1: mixers matched",
        xlabel="step",
        ylabel="relative squared error",
        yscale="log",
    )
    grid[1][1].set(
        title="stage 2: everything trained", xlabel="step", ylabel="loss (nats per byte)"
    )
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def _copied(figures: dict[str, Any]) -> dict[str, float]:
    """Fractions of copied characters by context length."""
    pairs = {k: v for k, v in figures["probe"].items() if k.startswith("copied")}
    return {key.partition(", ")[2]: value for key, value in pairs.items()}


def _draw_needles(axes: Any, phases: Any, titles: list[str], style: Any) -> None:
    names, label = list(phases)[1:], style.pop("label")
    for line, context in zip(("-", "--", ":"), _copied(phases[names[0]]), strict=False):
        values = [_copied(phases[name])[context] for name in names]
        axes.plot(titles, values, ls=line, label=f"{label}, {context} bytes", **style)
