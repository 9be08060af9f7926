"""What a finished run leaves to read: metrics as JSON, a plot of the loss, a table."""

import io
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.storage import write_bytes

if TYPE_CHECKING:
    from rich.table import Table

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, this library and those it computes with."""
    names = {"gated-kalmanet": _version("gated-kalmanet"), "python": platform.python_version()}
    return names | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on PYTHONPATH has no metadata
        return "not installed"


def hardware() -> dict[str, Any]:
    """The processor, its threads in use, and the accelerator if there is one."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "threads": torch.get_num_threads(), "gpus": gpus}


def bits_per_byte(loss: float, tokens: int, size: float) -> float:
    """Mean loss in nats per token as bits per byte of text: comparable between tokenizers."""
    return loss / math.log(2) * tokens / size


def curves(history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The Trainer's log as two lists of rows: losses in training, and on held-out documents."""
    noted = ("step", "loss", "learning_rate", "grad_norm", "seconds")
    return {
        "training": [{k: row[k] for k in noted if k in row} for row in history if "loss" in row],
        "evaluation": [
            {"step": row["step"], "loss": row["eval_loss"]} for row in history if "eval_loss" in row
        ],
    }


def plot_losses(metrics: dict[str, Any], path: Path) -> None:
    """Draw both losses against the step, and write them to `path` as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    training, evaluation = metrics["curves"]["training"], metrics["curves"]["evaluation"]
    axes.plot(*_points(training), lw=1.2, alpha=0.8, label="training batches")
    axes.plot(*_points(evaluation), marker="o", ms=4, label="held-out documents")
    final = metrics["evaluation"]
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(
        f"{metrics['model']['mixers']}, {metrics['model']['parameters'] / 1e6:.2f} M parameters: "
        f"{final['bits_per_byte']:.3f} bits per byte"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_bytes(path, image.getvalue())


def table(metrics: dict[str, Any]) -> "Table":
    """The run's figures, for a terminal."""
    from rich.table import Table

    model, data, spent, final = (metrics[k] for k in ("model", "data", "training", "evaluation"))
    rows = {
        "model": f"{model['mixers']}, {model['parameters']:,} parameters",
        "corpus": f"{data['bytes']:,} bytes in {data['documents']:,} documents",
        "trained on": f"{spent['tokens']:,} tokens in {spent['steps']:,} steps",
        "time in steps": f"{spent['seconds']:.0f} s ({spent['tokens_per_second']:,.0f} tokens/s)",
        "loss, last noted": f"{spent['loss']:.3f} nats per token",
        "loss, held out": f"{final['loss']:.3f} nats per token",
        "held out": f"{final['bits_per_byte']:.3f} bits per byte",
    }
    result = Table(show_header=False, title="Result", title_justify="left")
    for name, value in rows.items():
        result.add_row(name, value)
    return result


def _points(rows: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
