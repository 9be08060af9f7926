"""What the decoding benchmark found, as tables and a picture: from its JSON alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORED = ("float32", "bfloat16")


def markdown(result: dict[str, Any]) -> str:
    """Time of a step in us (lowest..highest), and its share of a copy's speed; a table for each source."""
    head = (
        f"{result['card']}, one token a sequence.\n"
        f"`{result['command']}`, {result['date']}, commit {result['commit']}."
    )
    return "\n\n".join([head, *("\n".join(table(part)) for part in result["sources"])]) + "\n"


def table(part: dict[str, Any]) -> Iterator[str]:
    """Of one source."""
    yield title(part)
    yield ""
    heads = " | ".join(f"batch {found['batch']}: us | GB/s" for found in part["step"])
    yield f"| kernel, solve, storage of U | {heads} |"
    yield "|---" * (1 + 2 * len(part["step"])) + "|"
    for name in part["step"][0]["rows"] if part["step"] else ():
        cells = []
        for found in part["step"]:
            row = found["rows"][name]
            low, high = 1e3 * row["min"], 1e3 * row["max"]
            cells += [f"{1e3 * row['median']:.1f} ({low:.1f}..{high:.1f})", f"{row['gbps']:.0f}"]
        yield f"| {name} | " + " | ".join(cells) + " |"
    steps = " | ".join(f"{found['adaptive_steps']:.1f} | " for found in part["step"])
    yield f"| steps of adaptive 30, mean | {steps}|"
    failed = [f"- not timed: {n}: {c['errors']}" for n, c in part["checks"].items() if not c["ok"]]
    if failed:
        yield "\n" + "\n".join(failed)


def title(part: dict[str, Any]) -> str:
    """What a source is."""
    about = part["about"]
    if not about:
        counts = sorted({found["layers"] for found in part["step"]})
        return (
            f"Artificial states and keys: {part['shape']}, layers: {', '.join(map(str, counts))}."
        )
    return (
        f"Trained model {part['source']}, {about['parameters'] / 1e6:.1f} M parameters, "
        f"{about['gka_layers']} of {about['layers']} layers GKA: {part['shape']}, ridge_ratio "
        f"{about['ridge_ratio']:g}. States after {about['context']} tokens ({about['text']}; a sequence "
        f"every {about['tokens_apart']} tokens)."
    )


def plot(result: dict[str, Any], path: Path) -> bool:
    """Time of a step over the batch size, a row for each source; whether matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    parts = result["sources"]
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(11, 4.5 * len(parts)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, part in zip(axes, parts, strict=True):
        draw(row, part)
    figure.suptitle(f"{result['card']}: one token a sequence, {parts[0]['shape']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def draw(axes: Any, part: dict[str, Any]) -> None:
    """A source's times, by how U is stored."""
    batches = [found["batch"] for found in part["step"]]
    for axis, stored in zip(axes, STORED, strict=True):
        for name in part["step"][0]["rows"]:
            if name.endswith(f"U {stored}"):
                medians = [1e3 * found["rows"][name]["median"] for found in part["step"]]
                style = "k--" if name.startswith("copy") else "o-"
                axis.loglog(batches, medians, style, label=name.rsplit(",", 1)[0], markersize=4)
        words = f"{part['source']}, U stored as {stored}"
        axis.set(xlabel="sequences", title=words, xticks=batches)
        axis.set_xticklabels(map(str, batches))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("us a step")
    axes[0].legend(fontsize=8)
