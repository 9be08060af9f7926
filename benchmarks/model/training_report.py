"""The table and the picture of `python -m benchmarks.run model`, from its JSON alone."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.model.sizes import SIZES

from gka.experiments.ledger import markdown_table, print_table, report
from gka.storage import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = (
    "size", "mixer", "kernels", "compiled", "checkpointing", "step ms (min-max)", "tokens/s", "MFU, 6 N",
    "MFU, with the mixer", "host ms", "device ms", "step / device", "peak GiB", "first step s",
    "to gated_deltanet", "to attention",
)  # fmt: skip
PROFILE_HEAD = ("group", "ms", "share", "launches")
PEERS = ("gated_deltanet", "attention")
Key = tuple[str, str, str, str]


def line(cell: dict[str, Any]) -> str:
    """A cell in a few words."""
    if cell["status"] != "ok":
        return f"{cell['status']}: {cell['message']}"
    ms = statistics.median(cell["step_ms"])
    return f"{ms:.1f} ms, {cell['tokens_per_s']:,.0f} tokens/s, first step {cell['first_step_s']:.1f} s"


def split(key: str) -> Key:
    size, mixer, compiled, checkpoint = key.split("/")
    return size, mixer, compiled, checkpoint


def measured(result: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """Cells that ran, by size, mixer, and ways of compiling and checkpointing; in the order of the sizes."""
    found = {split(key): cell for key, cell in result["cells"].items() if cell["status"] == "ok"}
    order = list(SIZES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))


def share(tflops: float | None, peak: float | None) -> str:
    return "" if tflops is None or peak is None else f"{tflops / peak:.1%}"


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """One a cell that ran."""
    cells = measured(result)
    for (size, mixer, compiled, checkpoint), cell in cells.items():
        times, peak = cell["step_ms"], cell["made"]["peak_tflops"]
        median = statistics.median(times)
        ratios = []
        for peer in PEERS:
            other = cells.get((size, peer, compiled, checkpoint))
            ratios.append(f"{median / statistics.median(other['step_ms']):.2f}" if other else "")
        memory = "" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 2**30:.1f}"
        yield [
            size, mixer, cell["backend"] or "", compiled, cell["checkpoint"],
            f"{median:.1f} ({min(times):.1f}-{max(times):.1f})", f"{cell['tokens_per_s']:,.0f}",
            share(cell["tflops_6n"], peak), share(cell["tflops"], peak),
            f"{statistics.mean(cell['host_ms']):.1f}", f"{cell['device_ms']:.1f}",
            f"{median / cell['device_ms']:.2f}", memory, f"{cell['first_step_s']:.1f}", *ratios,
        ]  # fmt: skip


def missing(result: dict[str, Any]) -> list[str]:
    """What did not run, and why."""
    return [
        f"{key}: {line(cell)}" for key, cell in result["cells"].items() if cell["status"] != "ok"
    ]


def facts(result: dict[str, Any]) -> list[str]:
    """What the cells were measured on and with, and the sizes."""
    cells = measured(result)
    told = {}
    for cell in cells.values():
        made = cell["made"]
        used = ", ".join(f"{name} {x}" for name, x in made["versions"].items() if x)
        text = f"{made['card']}; {used}; commit {made['commit'] or 'unknown'}; {cell['date']}"
        if made["peak_tflops"]:
            text += f"; peak by the data sheet {made['peak_tflops']:g} TFLOP/s"
        told[text] = None
    sizes = {}
    for (size, *_), cell in cells.items():
        least, most = sizes.get(size, (cell["parameters"],) * 2)
        sizes[size] = min(least, cell["parameters"]), max(most, cell["parameters"])
    for size, (least, most) in sizes.items():
        count = f"{least / 1e6:.0f}" + (f" to {most / 1e6:.0f}" if most > 1.005 * least else "")
        told[f"{size}: {SIZES[size]}, {count} M parameters, {SIZES[size].precision}"] = None
    return list(told)


FORMULA = (
    "MFU: model FLOPs of a step over its median time and the peak; 6 N a token (N without the embedding), "
    "and with the mixer's own products (benchmarks/model/sizes.py). Recomputation is not counted. Host ms: "
    "mean time until a queued step's call returns. Device ms: sum of a step's kernels by torch.profiler. "
    "Ratios to peers are of cells with the same ways of compiling and checkpointing."
)


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    settings = result["settings"]
    words = f"{settings['steps']} steps after the first and {settings['warm_up']} more. {FORMULA}"
    parts = [*facts(result), words, f"`{result['command']}`"]
    parts.append(markdown_table(HEAD, list(rows(result))))
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in missing(result))]).strip() + "\n"


def write(result: dict[str, Any], folder: Path) -> None:
    """To the terminal, model.md and model.png."""
    print_table(HEAD, list(rows(result)))
    print("\n".join([*facts(result), *missing(result)]))
    report(folder / "model", markdown(result), lambda figure: draw(result, figure))


def profiles(result: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Every cell that ran, and the kernels of its step by group, the longest first."""
    for key, cell in measured(result).items():
        yield (
            "/".join(key),
            [
                [x["group"], f"{x['ms']:.3f}", f"{x['share']:.1%}", f"{x['launches']:g}"]
                for x in cell["groups"]
            ],
        )


def write_profile(result: dict[str, Any], folder: Path) -> None:
    """To the terminal and model-profile.md."""
    parts = []
    for name, lines in profiles(result):
        print(f"kernels of a step, {name}")
        print_table(PROFILE_HEAD, lines)
        parts.append(f"## {name}\n\n{markdown_table(PROFILE_HEAD, lines)}\n")
    write_text(folder / "model-profile.md", "\n".join(parts))


def label(mixer: str, compiled: str, cell: dict[str, Any]) -> str:
    """A bar's name: the mixer, and what is not the default."""
    ways = [] if compiled == "layers" else ["eager" if compiled == "off" else compiled]
    ways += [] if cell["checkpoint"] == "none" else [cell["checkpoint"]]
    return ", ".join([mixer, *ways])


def draw(result: dict[str, Any], figure: "Figure") -> None:
    """Tokens a second of every mixer, a panel a size; eager cells paler."""
    cells = measured(result)
    sizes = list(dict.fromkeys(size for size, *_ in cells)) or ["nothing measured"]
    figure.set_size_inches(4.2 * len(sizes), 0.8 + 0.35 * max(4, len(cells) / len(sizes)))
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        found = {key[1:]: cell for key, cell in cells.items() if key[0] == size}
        labels = [label(mixer, ways[0], cell) for (mixer, *ways), cell in found.items()]
        speeds = [cell["tokens_per_s"] / 1e3 for cell in found.values()]
        bars = axis.barh(range(len(found)), speeds, color="#3b6ea5")
        for bar, (_, compiled, _) in zip(bars, found, strict=True):
            bar.set_alpha(0.5 if compiled == "off" else 1.0)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set(yticks=range(len(found)), yticklabels=labels, title=size)
        axis.set_xlabel("thousand tokens/s")
        axis.margins(x=0.15)
        axis.invert_yaxis()
