"""The table and the picture of `python -m benchmarks.run scale`, from its JSON alone."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scale.cells import MIXED_BASE, ROWS

from gka.experiments.ledger import markdown_table, print_table, report
from gka.parallel import Layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = (
    "row", "GPUs", "layout", "tokens a sequence", "tokens a step", "state", "compiled", "checkpointing",
    "step ms (min-max)", "host ms", "busy ms", "tokens/s", "tokens/s/GPU", "MFU", "efficiency", "GiB a GPU",
    "NCCL", "NCCL alone", "planned ms", "planned - measured", "planned GiB", "loss",
)  # fmt: skip
GOALS = {"dp": 0.90, "cp64k": 0.85}
PLANNER_GOAL = 0.15
MEASURED, PREDICTED = "measured", "predicted"


def milliseconds(cell: dict[str, Any]) -> float:
    """Median of the measured steps, or the plan's."""
    return statistics.median(cell["step_ms"]) if cell["status"] == "ok" else cell["plan"]["step_ms"]


def per_gpu(cell: dict[str, Any]) -> float:
    """Tokens a second and GPU."""
    return 1e3 * cell["tokens"] / milliseconds(cell) / cell["gpus"]


def has_speed(cell: dict[str, Any]) -> bool:
    return cell["status"] in ("ok", PREDICTED)


def efficiency(result: dict[str, Any], cell: dict[str, Any]) -> float | None:
    """Tokens/s/GPU over those of one GPU of the row; of two plans where the cell is a plan."""
    base = MIXED_BASE if cell["row"] == "mixed" else cell["row"]
    one = result["cells"].get(f"{base}/1")
    if one is None or not has_speed(cell):
        return None
    if cell["status"] == PREDICTED:
        planned = 1e3 * one["tokens"] / one["plan"]["step_ms"]
        return per_gpu(cell) / planned
    return per_gpu(cell) / per_gpu(one) if one["status"] == "ok" else None


def mfu(cell: dict[str, Any]) -> float | None:
    """Model FLOPs (gka.models.flops) over time and the data sheets' peak."""
    if not cell.get("peak_tflops"):
        return None
    return cell["flops_per_token"] * per_gpu(cell) / (1e12 * cell["peak_tflops"])


def planned_error(cell: dict[str, Any]) -> float | None:
    """The plan's time over the measured one, minus 1."""
    if cell["status"] != "ok":
        return None
    return cell["plan"]["step_ms"] / milliseconds(cell) - 1


def percent(x: float | None, sign: str = "") -> str:
    return "" if x is None else f"{x:{sign}.1%}"


def state(cell: dict[str, Any]) -> str:
    return MEASURED if cell["status"] == "ok" else cell["status"]


def ways(cell: dict[str, Any]) -> str:
    """How layers ran; those that were to be compiled may have had no graph."""
    made = cell.get("graphs")
    if cell["compiled"] == "off" or made is None:
        return cell["compiled"]
    return f"{cell['compiled']}, {sum(made.values())} graphs"


def busy(cell: dict[str, Any]) -> str:
    """Range over ranks."""
    known = [ms for ms in cell.get("busy_ms") or () if ms is not None]
    return f"{min(known):.0f}-{max(known):.0f}" if known else ""


def line(result: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """A row of the table."""
    plan, speed = cell["plan"], has_speed(cell)
    times = cell.get("step_ms")
    spread = f"{milliseconds(cell):.1f}" if speed else ""
    spread += f" ({min(times):.1f}-{max(times):.1f})" if times else ""
    memory = cell.get("peak_bytes")
    losses = " to ".join(f"{loss:.3f}" for loss in cell.get("loss", ()))
    return [
        cell["row"], str(cell["gpus"]), str(Layout(*cell["sizes"])) or "1 GPU", f"{cell['length']:,}",
        f"{cell['tokens']:,}", state(cell), ways(cell), cell["checkpoint"], spread,
        f"{cell['host_ms']:.1f}" if "host_ms" in cell else "", busy(cell),
        f"{per_gpu(cell) * cell['gpus']:,.0f}" if speed else "", f"{per_gpu(cell):,.0f}" if speed else "",
        percent(mfu(cell)) if speed else "", percent(efficiency(result, cell)),
        f"{memory / 2**30:.1f}" if memory else "", percent(cell.get("nccl_share")),
        percent(cell.get("nccl_alone")), f"{plan['step_ms']:.1f}", percent(planned_error(cell), "+"),
        f"{plan['bytes'] / 2**30:.1f}", losses,
    ]  # fmt: skip


def ordered(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells by row and GPUs."""
    places = list(ROWS)
    return sorted(result["cells"].values(), key=lambda x: (places.index(x["row"]), x["gpus"]))


def table(result: dict[str, Any]) -> list[list[str]]:
    return [line(result, cell) for cell in ordered(result)]


def missing(result: dict[str, Any]) -> list[str]:
    """What was not measured, and why."""
    return [
        f"{cell['row']} on {cell['gpus']} GPUs: {state(cell)}: {cell['message']}"
        for cell in ordered(result)
        if cell.get("message")
    ]


def checked(result: dict[str, Any]) -> list[str]:
    """The checks of equal losses, one line a layout and type."""
    told = []
    for gpus, found in sorted(result["checks"].items(), key=lambda x: int(x[0])):
        if "layouts" not in found:
            told.append(f"{gpus} GPUs: not checked: {found.get('message', found['status'])}")
        for x in found.get("layouts", ()):
            told.append(
                f"{x['layout']}, {x['dtype']}: loss {x['loss']:.6f} beside {x['loss_of_one']:.6f} of one "
                f"GPU (apart {x['loss_apart']:.1e}), gradients' norm apart {x['norm_apart']:.1e}: "
                f"{'equal' if x['equal'] else 'NOT EQUAL'}"
            )
    return told


def verdicts(result: dict[str, Any]) -> list[str]:
    """Goals beside what was measured."""
    told = []
    for row, goal in GOALS.items():
        cells = [c for c in ordered(result) if c["row"] == row and c["status"] == "ok"]
        most = max(cells, key=lambda c: c["gpus"], default=None)
        found = None if most is None or most["gpus"] == 1 else efficiency(result, most)
        if most is not None and found is not None:
            told.append(f"{row}: {found:.1%} efficiency on {most['gpus']} GPUs (goal {goal:.0%})")
    errors = [abs(e) for c in ordered(result) if (e := planned_error(c)) is not None]
    if errors:
        within = sum(e <= PLANNER_GOAL for e in errors)
        told.append(
            f"planner within {PLANNER_GOAL:.0%} of {within} of {len(errors)} cells, at most "
            f"{max(errors):.1%} off"
        )
    return told


WORDS = (
    "A step: forward, backward, clipping, fused AdamW; float32 parameters, products in bfloat16, FSDP2 on "
    "several GPUs. Step ms: of the slowest rank, median and range; host ms: until a step's call returns; "
    "busy ms: kernels but NCCL's in a traced step, range over ranks. Efficiency: tokens/s/GPU over those of "
    f"one GPU of the same row (mixed: of {MIXED_BASE}). MFU: model FLOPs of gka.models.flops over the data "
    "sheet's peak. GiB: largest peak of any GPU. NCCL: part of a traced step in which its kernels run, "
    "waiting for slower ranks included; alone: no other kernel runs beside them. Predicted: no such GPUs "
    "here, the planner's figures."
)


def facts(result: dict[str, Any]) -> list[str]:
    used = ", ".join(f"{name} {x}" for name, x in result["versions"].items() if x)
    settings = result["settings"]
    return [
        f"{result['there']} x {result['card']}; {used}; commit {result['commit'] or 'unknown'}; "
        f"{result['date']}; {settings['steps']} steps after {settings['warm_up'] + 1}; planner: "
        f"{result['planner']}"
    ]


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    lists = [checked(result), verdicts(result), missing(result)]
    parts = [*facts(result), WORDS, f"`{result['command']}`", markdown_table(HEAD, table(result))]
    parts += ["\n".join(f"- {text}" for text in told) for told in lists if told]
    return "\n\n".join(parts) + "\n"


def write(result: dict[str, Any], folder: Path) -> None:
    """To the terminal, scale.md and scale.png."""
    print_table(HEAD, table(result))
    print("\n".join([*facts(result), *checked(result), *verdicts(result), *missing(result)]))
    report(folder / "scale", markdown(result), lambda figure: draw(result, figure))


def draw(result: dict[str, Any], figure: "Figure") -> None:
    """Efficiency, and tokens a second, against GPUs: a line a row; predicted cells hollow."""
    figure.set_size_inches(11, 4.4)
    left, right = figure.subplots(1, 2)
    cells = [cell for cell in ordered(result) if has_speed(cell)]
    for number, row in enumerate(dict.fromkeys(cell["row"] for cell in cells)):
        own = [cell for cell in cells if cell["row"] == row]
        color = f"C{number}"
        speeds = [(c, per_gpu(c) * c["gpus"] / 1e3) for c in own]
        _line(right, speeds, color, ROWS[row].title)
        shares = [(c, e) for c in own if (e := efficiency(result, c)) is not None]
        _line(left, [(c, 100 * e) for c, e in shares], color, ROWS[row].title)
    left.axhline(100, color="0.7", linewidth=0.8)
    left.set(ylabel="efficiency against one GPU, %", ylim=(0, 115))
    right.set(ylabel="thousand tokens/s", yscale="log")
    for formatter in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        formatter("{x:g}")
    counts = sorted({cell["gpus"] for cell in cells}) or [1]
    for axis in (left, right):
        axis.set(xlabel="GPUs (filled: measured, hollow: predicted)", xscale="log", xticks=counts)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([str(count) for count in counts])
        axis.grid(alpha=0.3)
    if cells:
        right.legend(fontsize=8)


def _line(axis: Any, points: list[tuple[dict[str, Any], float]], color: str, label: str) -> None:
    """Points in order, joined; those of plans hollow and by dashes."""
    if not points:
        return
    for filled in (True, False):
        own = [(c["gpus"], y) for c, y in points if (c["status"] == "ok") == filled]
        face = color if filled else "none"
        if own:
            axis.plot(*zip(*own, strict=True), "o", color=color, markerfacecolor=face)
    real = [(c["gpus"], y) for c, y in points if c["status"] == "ok"]
    every = [(c["gpus"], y) for c, y in points]
    axis.plot(*zip(*every, strict=True), "--", color=color, linewidth=0.9)
    if real:
        axis.plot(*zip(*real, strict=True), "-", color=color)
    axis.plot([], [], "o-", color=color, label=label)
