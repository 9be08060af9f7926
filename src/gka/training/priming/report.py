"""The report of a priming run: figures as JSON, tables as Markdown, a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.storage import write_bytes, write_json, write_text
from gka.training.run import curves, hardware, versions

if TYPE_CHECKING:
    from rich.table import Table

    from gka.models import GKAForCausalLM

JSON, MARKDOWN, PICTURE = "report.json", "report.md", "priming.png"
TITLES = {
    "teacher": "teacher", "initial": "hybrid at the start",
    "stage1": "after stage 1", "stage2": "after stage 2",
}  # fmt: skip


def description(teacher: "GKAForCausalLM", layers: list[int], mixer: str) -> dict[str, Any]:
    """The replaced layers, and the parts of the attention that have no counterpart."""
    config = teacher.config
    dropped = ["rotary positions"]
    dropped += ["norms of queries and keys"] if config.qk_norm else []
    dropped += ["biases"] if config.attention_bias or config.attention_output_bias else []
    if any(config.pattern[layer] == "swa" for layer in layers):
        dropped.append("sliding windows")
    return {"layers": layers, "mixer": mixer, "dropped": dropped, "pattern": config.pattern}


def stage(history: list[dict[str, Any]], tokens_of_a_step: int) -> dict[str, Any]:
    """A stage's loss curves, tokens and seconds."""
    found = curves(history)
    last = found["training"][-1]
    tokens = last["step"] * tokens_of_a_step
    return {
        "steps": last["step"],
        "tokens": tokens,
        "seconds": last["seconds"],
        "tokens_per_second": tokens / last["seconds"],
        "curves": found,
    }


def completed(about: dict[str, Any], hybrid: "GKAForCausalLM") -> dict[str, Any]:
    """The metrics: `about`, the recovered shares of the gap, the model, versions and hardware."""
    from gka.training.priming.inputs import share_recovered
    from gka.training.run import mixers

    phases = about["phases"]
    losses = {name: phase["loss"] for name, phase in phases.items()}
    for name, phase in phases.items():
        phase["recovered"] = share_recovered(losses["teacher"], losses["initial"], losses[name])
    return about | {
        "model": {
            "mixers": mixers(hybrid.config),
            "parameters": sum(p.numel() for p in hybrid.parameters()),
        },
        "versions": versions(),
        "hardware": hardware(),
    }


def write(metrics: dict[str, Any], folder: Path, *, picture: bool) -> None:
    """Write all files of the report, each atomically."""
    write_json(folder / JSON, metrics)
    write_text(folder / MARKDOWN, markdown(metrics))
    if picture:
        draw(metrics, folder / PICTURE)


def phase_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Loss, perplexity, bits per byte, recovered share of the gap and the probe's figures, by phase."""
    rows = []
    for name, phase in metrics["phases"].items():
        share = phase["recovered"]
        row = [TITLES[name], f"{phase['loss']:.4f}", f"{phase['perplexity']:.3f}"]
        row += [f"{phase['bits_per_byte']:.4f}", "-" if share is None else f"{share:.1%}"]
        rows.append(row + [f"{value:.3f}" for value in phase.get("probe", {}).values()])
    return rows


def heads(metrics: dict[str, Any]) -> list[str]:
    """Column titles of `phase_rows`."""
    further = next(iter(metrics["phases"].values())).get("probe", {})
    return ["model", "loss", "perplexity", "bits per byte", "gap recovered", *further]


def markdown(metrics: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    layers = ", ".join(map(str, metrics["layers"]))
    lines = [
        "# Priming", "",
        f"Layers {layers} of {len(metrics['pattern'])} became `{metrics['mixer']}`: "
        f"{metrics['model']['mixers']}, {metrics['model']['parameters']:,} parameters. Without counterpart, "
        f"and dropped: {', '.join(metrics['dropped'])}.", "",
        *_table(heads(metrics), phase_rows(metrics)), "",
        "Held out, in nats a token. 0 % of the gap is the hybrid at the start, 100 % the teacher.", "",
        *_table(["layer", "error before stage 1", "after"], match_rows(metrics)), "",
        "Squared error of a new mixer's output on the teacher's hidden states, relative to the attention's "
        "output.", "",
    ]  # fmt: skip
    if metrics["stages"]:
        rows = [
            [
                name,
                f"{s['steps']:,}",
                f"{s['tokens']:,}",
                f"{s['seconds']:.1f}",
                f"{s['tokens_per_second']:,.0f}",
            ]
            for name, s in metrics["stages"].items()
        ]
        lines += _table(["stage", "steps", "tokens", "seconds", "tokens a second"], rows)
    return "\n".join(lines) + "\n"


def match_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Each layer's error before and after stage 1."""
    match = metrics["match"]
    after = match.get("after", {})
    return [
        [layer, f"{error:.4f}", f"{after[layer]:.4f}" if layer in after else "-"]
        for layer, error in match["before"].items()
    ]


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    cells = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def table(metrics: dict[str, Any]) -> "Table":
    """The phases' figures as a table for a terminal."""
    from rich.table import Table

    result = Table(title=f"{metrics['model']['mixers']}", title_justify="left")
    for index, title in enumerate(heads(metrics)):
        result.add_column(title, justify="right" if index else "left")
    for row in phase_rows(metrics):
        result.add_row(*row)
    return result


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Write a PNG with four panels: both stages' losses, layers' errors, phases' bits per byte."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = FigureCanvasAgg(figure).figure.subplots(2, 2)
    _draw_stage(grid[0][0], metrics, "stage1", "relative error (loss of stage 1)")
    grid[0][0].set_yscale("log")
    _draw_stage(grid[0][1], metrics, "stage2", "loss (nats per token)")
    for name, dashes in (("teacher", "-"), ("initial", ":")):
        grid[0][1].axhline(
            metrics["phases"][name]["loss"], color="0.4", ls=dashes, lw=1, label=TITLES[name]
        )
    grid[0][1].legend(fontsize="small")
    _draw_match(grid[1][0], metrics)
    _draw_phases(grid[1][1], metrics)
    figure.suptitle(
        f"{metrics['model']['mixers']}, {metrics['model']['parameters'] / 1e6:.1f} M parameters"
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_bytes(path, image.getvalue())


def _draw_stage(axes: Any, metrics: dict[str, Any], name: str, label: str) -> None:
    axes.set(title=f"stage {name[-1]}", xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    if name not in metrics["stages"]:
        axes.set_title(f"stage {name[-1]}: left out")
        return
    for kind, title, style in (
        ("training", "training batches", {"color": "#56B4E9", "lw": 1}),
        ("evaluation", "held out", {"color": "#0072B2", "marker": "o", "ms": 4}),
    ):
        rows = metrics["stages"][name]["curves"][kind]
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=title, **style)
    axes.legend(fontsize="small")


def _draw_match(axes: Any, metrics: dict[str, Any]) -> None:
    before, after = metrics["match"]["before"], metrics["match"].get("after", {})
    places = range(len(before))
    axes.bar(
        [i - 0.2 for i in places], list(before.values()), 0.4, color="#E69F00", label="at the start"
    )
    if after:
        axes.bar(
            [i + 0.2 for i in places],
            list(after.values()),
            0.4,
            color="#0072B2",
            label="after stage 1",
        )
    axes.axhline(1.0, color="0.4", lw=0.8, ls=":")
    axes.margins(y=0.2)
    axes.set_xticks(list(places), list(before))
    axes.set(title="match of each layer", xlabel="layer", ylabel="relative squared error")
    axes.legend(fontsize="small", loc="upper center", ncols=2)


def _draw_phases(axes: Any, metrics: dict[str, Any]) -> None:
    phases = metrics["phases"]
    values = [phase["bits_per_byte"] for phase in phases.values()]
    colors = {"teacher": "#000000", "initial": "#E69F00", "stage1": "#56B4E9", "stage2": "#0072B2"}
    titles = [TITLES[name].replace(" at", "\nat").replace("after ", "after\n") for name in phases]
    bars = axes.bar(titles, values, color=[colors[name] for name in phases])
    shares = [phase["recovered"] for phase in phases.values()]
    labels = [
        f"{value:.3f}" + ("" if share is None else f"\n{share:.0%}")
        for value, share in zip(values, shares, strict=True)
    ]
    axes.bar_label(bars, labels=labels, fontsize="small")
    axes.margins(y=0.2)
    axes.set(title="held out, and share of the gap recovered", ylabel="bits per byte")
