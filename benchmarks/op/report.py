"""Report of the op benchmark from its JSON: a table in the terminal, Markdown and a plot."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.op.trained import head_of_histogram
from benchmarks.registry import BASELINE_LAYER, BASELINES

from gka.experiments import stopwatch
from gka.experiments.ledger import markdown_table, print_table, report
from gka.storage import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
HEAD = (
    "B x T x H, D", "function", "forward ms (min-max)", "ratio", "forward + backward ms (min-max)",
    "ratio", "forward TFLOP/s (of peak)", "peak MiB",
)  # fmt: skip
PROFILE_HEAD = ("", "kernels ms", "launches", "kept for the backward pass MiB", "peak MiB")
PASSES = ("forward", "forward+backward")


def ratio(times: dict | None, base: dict | None) -> str:
    """Median and range of the ratios of each round's medians."""
    if not times or not base:
        return ""
    median, least, most = stopwatch.spread(stopwatch.ratios(times["ms"], base["ms"]))
    return f"{median:.2f} ({least:.2f}-{most:.2f})"


def span(times: dict | None) -> str:
    """Median and range; a star if the host needs longer to launch than the device to run."""
    if not times:
        return ""
    star = "*" if (times["host_ms"] or 0.0) > times["median"] else ""
    return f"{times['median']:.3f}{star} ({times['min']:.3f}-{times['max']:.3f})"


def cells(name: str, entry: dict, base: dict, peak: float | None) -> list[str]:
    """A row of the table without the size."""
    row = [name]
    for which in PASSES:
        row += [span(entry.get(which)), ratio(entry.get(which), base.get(which))]
    speed = ""
    if entry.get("flops"):
        tera = entry["flops"] / entry["forward"]["median"] / 1e9
        speed = f"{tera:.0f}" + (f" ({tera / peak:.0%})" if peak else "")
    mebibytes = entry.get("peak_bytes")
    return [*row, speed, "" if mebibytes is None else f"{mebibytes / 2**20:.0f}"]


def rows(result: dict) -> Iterator[list[str]]:
    """Rows of the table by size, with only the first measurement of the baseline."""
    peak = result["card"].get("matmul_tflops")
    for size in dict.fromkeys(group["size"] for group in result["groups"]):
        for group in result["groups"]:
            if group["size"] == size:
                base = group["contenders"].get(baseline(group), {})
                for name, entry in shown(group).items():
                    yield [size, *cells(name, entry, base, peak)]


def baseline(group: dict) -> str:
    """The denominator of a group's ratios: the first of BASELINES that was measured in it."""
    found = [x for x in BASELINES if group["contenders"].get(x, {}).get("status") == "ok"]
    return found[0] if found else BASELINES[-1]


def shown(group: dict) -> dict[str, dict]:
    """Entries that were measured in a group, without the baseline if the group only repeats it."""
    return {
        name: entry
        for name, entry in group["contenders"].items()
        if entry["status"] == "ok" and not (group.get("repeated") and name in BASELINES)
    }


def missing(result: dict) -> list[str]:
    """Lines about functions that were not measured, one per function and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    others = [result[name] for name in ("layer", "op_profile", "layer_profile") if name in result]
    for group in [*result["groups"], *others]:
        for name, entry in group["contenders"].items():
            if entry["status"] != "ok" and not (group.get("repeated") and name in BASELINES):
                reason = f"{entry['status']}: {entry['message']}"
                found.setdefault((name, reason), []).append(group["size"])
    return [f"{name} {reason} ({'; '.join(sizes)})" for (name, reason), sizes in found.items()]


def wrong(result: dict) -> list[str]:
    """Lines about functions that were timed although their gradients are known to be wrong on this chip."""
    found: dict[tuple[str, str], list[str]] = {}
    for group in result["groups"]:
        for name, entry in shown(group).items():
            if "wrong" in entry:
                found.setdefault((name, entry["wrong"]), []).append(group["size"])
    return [
        f"{name} is timed, but not to be trained with here: {reason} ({'; '.join(sizes)})"
        for (name, reason), sizes in found.items()
    ]


def layer_rows(result: dict) -> Iterator[list[str]]:
    group = result.get("layer")
    if not group:
        return
    entries = shown(group)
    base = entries.get(BASELINE_LAYER, {})
    for name, entry in entries.items():
        parameters = entry.get("parameters")
        count = "" if parameters is None else f" ({parameters / 1e6:.1f} M parameters)"
        yield [group["size"], *cells(name + count, entry, base, None)]


def profile_rows(result: dict) -> Iterator[list[str]]:
    """Kernels and memory of one training step of each profiled layer."""
    for name, entry in shown(result.get("layer_profile", {"contenders": {}})).items():
        held = [entry.get(key) for key in ("kept_bytes", "peak_bytes")]
        memory = ["" if x is None else f"{x / 2**20:.0f}" for x in held]
        yield [name, f"{entry['kernels_ms']:.2f}", f"{entry['launches']:g}", *memory]


def growth(result: dict) -> Iterator[str]:
    """Time of a long sequence relative to as many tokens in sequences of 8192, by contender and head dim."""
    whole: dict[tuple, dict] = {
        (g["shape"]["heads"], g["shape"]["dim"], g["shape"]["length"]): g["contenders"]
        for g in result["groups"]
        if g["shape"]["batch"] == 1
    }
    for (heads, dim, length), longer in whole.items():
        short = whole.get((heads, dim, 8192), {})
        if length <= 8192:
            continue
        for name, entry in longer.items():
            for which in PASSES:
                a, b = entry.get(which), short.get(name, {}).get(which)
                if a and b:
                    factor = length / 8192
                    linear = a["median"] / (factor * b["median"])
                    yield (
                        f"{name}, D = {dim}, {which}: {length} tokens take {linear:.2f} times "
                        f"{factor:.0f} x 8192 tokens"
                    )


def facts(result: dict) -> list[str]:
    """Hardware, versions and settings of the measurements."""
    card, versions = result["card"], result["versions"]
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    measured = ""
    if card.get("matmul_tflops"):
        measured = (
            f" Measured in the same process: {card['matmul_tflops']:.0f} TFLOP/s in an 8192 x 8192 x 8192 "
            f"bfloat16 product of random matrices, {card['copy_tbps']:.2f} TB/s read and written by a copy."
        )
    lines = [
        f"{card['name']}; {used}; commit {result['commit'] or 'unknown'}; {result['date']}.{measured}",
        f'backend="{result["backend"]}", bfloat16, 30 steps, keys: {result["keys"]}. '
        f"Ratios are to {' or else '.join(BASELINES)} (layers: {BASELINE_LAYER}), in the same rounds. "
        "A star: the host needs longer to launch the kernels than the device to run them.",
    ]
    if "trained" in result:
        model = result["trained"]
        parts = zip(head_of_histogram(), model["histogram"], strict=True)
        told = ", ".join(f"{name}: {count}" for name, count in parts if count)
        lines.append(
            f"Inputs: a trained model of {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} "
            f"layers x {model['heads']} heads of {model['dim']}, on held-out text. Heads by tokens that they "
            f"remember: {told}."
        )
    return lines


def markdown(result: dict) -> str:
    """The results in Markdown with their command, for docs/performance.md."""
    parts = [*facts(result), f"`{result['command']}`", markdown_table(HEAD, list(rows(result)))]
    found = list(layer_rows(result))
    if found:
        parts += [
            "One layer, forward and backward to its input and parameters:",
            markdown_table(HEAD, found),
        ]
    found = list(profile_rows(result))
    if found:
        size = result["layer_profile"]["size"]
        words = (
            "forward and backward to its input and parameters, mean of several by torch.profiler"
        )
        parts += [f"{size[0].upper()}{size[1:]}, {words}:", markdown_table(PROFILE_HEAD, found)]
    lines = [f"- {line}" for line in [*growth(result), *missing(result), *wrong(result)]]
    return "\n\n".join([*parts, "\n".join(lines)]).strip() + "\n"


def update(page: Path, result: dict) -> None:
    """Write the results between the page's markers.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN} and {END} to write between.")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    write_text(page, f"{before}{BEGIN}\n{markdown(result)}{END}{after}")


def write(result: dict, folder: Path) -> None:
    """Write the results to the terminal, op.md and op.png."""
    print_table(HEAD, [*rows(result), *layer_rows(result)])
    print("\n".join([*facts(result), *growth(result), *missing(result), *wrong(result)]))
    report(folder / "op", markdown(result), lambda figure: draw(result, figure))


def draw(result: dict, figure: "Figure") -> None:
    """Draw the times of forward and forward + backward of every contender and size."""
    sizes = list(dict.fromkeys(group["size"] for group in result["groups"]))
    names = list(dict.fromkeys(n for g in result["groups"] for n in g["contenders"]))
    figure.set_size_inches(11, 0.6 + 0.75 * max(2, len(sizes)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, which in zip(axes, PASSES, strict=True):
        for i, name in enumerate(names):
            points = [
                (sizes.index(g["size"]) + 0.12 * (i - len(names) / 2), shown(g)[name][which])
                for g in result["groups"]
                if shown(g).get(name, {}).get(which)
            ]
            if points:
                y, times = zip(*points, strict=True)
                axis.scatter([t["median"] for t in times], y, s=22, label=name)
        axis.set(xscale="log", xlabel=f"{which}, ms", yticks=range(len(sizes)), yticklabels=sizes)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    if axes[1].collections:
        axes[1].legend(frameon=False, fontsize=8)
