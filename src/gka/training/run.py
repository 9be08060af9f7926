"""One training run, from text to the saved model, its metrics and their plot."""

import io
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gka import __version__
from gka.data import load_tokenizer
from gka.errors import InputError
from gka.parallel import Layout, current, joined, whole_weights
from gka.parallel.vocabulary import splits
from gka.storage import write_bytes, write_json
from gka.training import folder as files
from gka.training import scale
from gka.training.checkpoints import has_sharded
from gka.training.compilation import CUDA_GRAPHS, check_graphs, chosen
from gka.training.config import APART, ON, RUNNING, RunConfig, TrainingConfig
from gka.training.inputs import Text, open_text
from gka.training.loop import Interrupted, fit
from gka.training.mesh_trainer import on_mesh, with_weights
from gka.training.start import build_model, check_given, first_model
from gka.training.telemetry import check_tensorboard
from gka.training.trainer import DecoderTrainer

__all__ = ["Interrupted", "build_model", "train"]


def train(
    config: RunConfig,
    output: Path,
    *,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a model, write the run to `output` and return its metrics.

    Args:
        config: the run.
        output: folder of the run, new or empty unless `resume` or `overwrite`.
        console: where progress is shown.
        resume: continue from the newest whole checkpoint in `output`, or from step 0 if there is none.
        overwrite: delete the run in `output` first.

    Raises:
        InputError: an argument cannot be used (nothing is deleted then), or the loss is not finite.
        Interrupted: after SIGINT, SIGTERM or SIGHUP to any rank, once the checkpoint is written.
        LostRank: another process of the job has ended without a word.
    """
    with joined(f"Resume: gka train --resume --output {output}") as job:
        job.agree(scale.common_facts(config))
        with files.open_output(output, console, resume=resume, overwrite=overwrite) as complete:
            if complete is not None:
                return complete
            return _train(config, output, console, resume, overwrite)


def _train(
    config: RunConfig, output: Path, console: Console, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """`train`, after `output` was checked and locked."""
    _check_graphs(config)
    check_given(config)
    if config.training.tensorboard:
        check_tensorboard()
    job = current()
    with job.together():
        layout = scale.chosen_layout(config.parallel, config.data.sequence_length)
        tokenizer = load_tokenizer(config.data.tokenizer)
    text = job.main_first(lambda: open_text(config, tokenizer, console))
    with job.together():
        model, fill = first_model(config, tokenizer, layout)
        scale.check_model(model, layout, config.training.compile)
        training = _begun(config, layout, output, text.checksums, resume, overwrite)
    _introduce(training, config.data.sequence_length, model, output, console, layout)
    folder, blocks = output / files.CHECKPOINTS, (text.training, text.evaluation)
    kind, saves = None, scale.background_saves(training)
    if saves is not None or job.ranks > 1 or (resume and has_sharded(folder)):
        model, mesh = scale.place(model, layout, training, fill)
        kind = on_mesh(layout, mesh, saves)
    trainer = fit(
        model, training, folder, blocks, tokenizer, console=console, resume=resume, kind=kind,
        readers=layout.readers, saves=saves,
    )  # fmt: skip
    metrics = _metrics(config, trainer, text, layout)
    weights = whole_weights(trainer.model) if job.ranks > 1 else None  # pyright: ignore[reportArgumentType]
    with job.together():
        if job.is_main:
            trained = trainer.model if weights is None else with_weights(model.config, weights)
            files.save_model(trained, tokenizer, output / files.MODEL)
            plot_losses(metrics, output / files.PLOT)
            write_json(output / files.METRICS, metrics)  # last: it marks the run as complete
    return metrics


def _check_graphs(config: RunConfig) -> None:
    """Raise `InputError` for what CUDA graphs cannot train, before anything is written.

    One is documents apart, whose number differs from batch to batch.
    """
    if config.training.compile != CUDA_GRAPHS:
        return
    check_graphs(config.training.gradient_accumulation, alone=True)
    if config.training.save_async == ON:
        raise InputError(
            f"compile is {CUDA_GRAPHS!r}, which trains in one process with its own checkpoints, and "
            f"save_async {ON!r}: leave save_async out"
        )
    if config.data.documents == APART:
        raise InputError(
            f"compile is {CUDA_GRAPHS!r}, which records one shape, and documents are {APART!r}, whose "
            f"number differs from batch to batch; give --documents {RUNNING}, or compile layers"
        )
    chosen(CUDA_GRAPHS, current().device)


def _begun(
    config: RunConfig,
    layout: Layout,
    output: Path,
    checksums: dict[str, str],
    resume: bool,
    overwrite: bool,
) -> TrainingConfig:
    """Write or check run.json; the training settings with which these ranks take the run's global batch."""
    began = scale.blocks_of_a_step(config.training, layout.readers)
    facts = {files.RANKS: layout.ranks, files.GLOBAL_BATCH: began}
    files.begin(config, output, checksums, resume=resume, overwrite=overwrite, facts=facts)
    if resume:
        # a run of an earlier version was one of one process
        began = files.global_batch(output) or scale.blocks_of_a_step(config.training, 1)
    return scale.same_batch(config.training, began, layout.readers)


def _introduce(
    training: TrainingConfig,
    tokens: int,
    model: Any,
    output: Path,
    console: Console,
    layout: Layout,
) -> None:
    """Print the model, the steps, the ranks and the output folder before training begins."""
    blocks = scale.blocks_of_a_step(training, layout.readers)
    ranks = f" on {layout.ranks} ranks ({layout})" if layout.ranks > 1 else ""
    console.print(
        f"model: {mixers(model.config)}, {model.num_parameters():,} parameters; "
        f"{training.max_steps:,} steps of {blocks} x {tokens} tokens{ranks}, into {output}",
        highlight=False,
        soft_wrap=True,
    )
    words = model.config.vocab_size
    if not splits(words, layout.tp):
        console.print(
            f"embedding and head are whole on every rank: {words} words do not divide by tp = {layout.tp}",
            highlight=False,
            soft_wrap=True,
        )


def _metrics(
    config: RunConfig, trainer: DecoderTrainer, text: Text, layout: Layout
) -> dict[str, Any]:
    noted = curves(trainer.state.log_history)
    last = noted["training"][-1]
    for row in noted["evaluation"]:
        row["bits_per_byte"] = bits_per_byte(row["loss"], *text.held_out)
    args, length = trainer.args, config.data.sequence_length
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * layout.readers
    tokens = last["step"] * rows * length
    model: Any = trainer.model
    return {
        "config": config.tables(),
        "model": {
            "mixers": mixers(model.config),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "data": text.figures(),
        "training": {
            "steps": last["step"],
            "tokens": tokens,
            "compiled": trainer.compiled,
            "ranks": layout.ranks,
            "blocks_per_step": rows,
            "seconds": last["seconds"],
            "tokens_per_second": tokens / last["seconds"],
            "loss": last["loss"],
        },
        "evaluation": noted["evaluation"][-1],
        "curves": noted,
        "versions": versions(),
        "hardware": hardware(),
    }


def mixers(config: Any) -> str:
    """The mixers of a model with their counts, such as "26 gka + 4 attention"."""
    names = list(config.pattern)
    return " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, this library and `LIBRARIES`."""
    names = {"gated-kalmanet": __version__, "python": platform.python_version()}
    return names | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on PYTHONPATH has no metadata
        return "not installed"


def hardware() -> dict[str, Any]:
    """The processor, torch's number of threads, and the GPUs' names."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "threads": torch.get_num_threads(), "gpus": gpus}


def bits_per_byte(loss: float, tokens: int, size: float) -> float:
    """Bits per byte of text from a mean loss in nats per token: comparable between tokenizers."""
    return loss / math.log(2) * tokens / size


def curves(history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The Trainer's log as two lists of rows: training losses and held-out losses."""
    noted = ("step", "loss", "learning_rate", "grad_norm", "seconds")
    return {
        "training": [{k: row[k] for k in noted if k in row} for row in history if "loss" in row],
        "evaluation": [
            {"step": row["step"], "loss": row["eval_loss"]} for row in history if "eval_loss" in row
        ],
    }


def plot_losses(metrics: dict[str, Any], path: Path) -> None:
    """Plot both losses against the step and write the plot to `path` as PNG."""
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


def table(metrics: dict[str, Any]) -> Table:
    """The run's metrics as a table for a terminal."""
    model, data, spent, final = (metrics[k] for k in ("model", "data", "training", "evaluation"))
    rows = {
        "model": f"{model['mixers']}, {model['parameters']:,} parameters",
        "corpus": _corpus(data),
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


def _corpus(data: dict[str, Any]) -> str:
    """The corpus in words; of a streamed one the counts are not known."""
    if data["bytes"] is None:
        return f"streamed, {data['held_out_tokens']:,} tokens held out"
    return f"{data['bytes']:,} bytes in {data['documents']:,} documents"


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
