"""One training run, from text to the saved model, its metrics and their plot."""

import io
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from gka.console import status
from gka.data import (
    PackedTokens,
    TokenBlocks,
    find_documents,
    load_tokenizer,
    pack,
    token_blocks,
    vocabulary_size,
)
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from gka.models.fields import fewest_parameters
from gka.storage import write_bytes, write_json
from gka.training import folder as files
from gka.training.config import DataConfig, RunConfig
from gka.training.loop import DecoderTrainer, Interrupted, fit, recompute_layers, tokens_of_a_step
from gka.training.start import start_from

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
        Interrupted: after SIGINT, SIGTERM or SIGHUP, once the checkpoint is written.
    """
    with files.open_output(output, console, resume=resume, overwrite=overwrite) as complete:
        if complete is not None:
            return complete
        return _train(config, output, console, resume, overwrite)


def _train(
    config: RunConfig, output: Path, console: Console, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """`train`, after `output` was checked and locked."""
    config.data.check_given()
    tokenizer = load_tokenizer(config.data.tokenizer)
    packed = pack_text(config.data, tokenizer, console)
    blocks = token_blocks(packed, config.data.sequence_length, config.data.eval_fraction)
    model = build_model(config, tokenizer)
    checksums = {"tokens_sha256": packed.checksum}
    files.begin(config, output, checksums, resume=resume, overwrite=overwrite)
    _introduce(config, model, output, console)
    folder = output / files.CHECKPOINTS
    trainer = fit(model, config.training, folder, blocks, tokenizer, console=console, resume=resume)
    metrics = _metrics(config, trainer, packed, blocks)
    if trainer.is_world_process_zero():
        files.save_model(trainer.model, tokenizer, output / files.MODEL)
        plot_losses(metrics, output / files.PLOT)
        write_json(output / files.METRICS, metrics)  # last: it marks the run as complete
    return metrics


def _introduce(config: RunConfig, model: PreTrainedModel, output: Path, console: Console) -> None:
    """Print the model, the steps and the output folder before training begins."""
    training, tokens = config.training, config.data.sequence_length
    blocks = training.batch_size * training.gradient_accumulation
    console.print(
        f"model: {mixers(model.config)}, {model.num_parameters():,} parameters; "
        f"{training.max_steps:,} steps of {blocks} x {tokens} tokens, into {output}",
        highlight=False,
        soft_wrap=True,
    )


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained model of a run; settings, vocabulary size and seed determine its weights.

    Raises:
        InputError: the [model] table does not describe a model, or it is too large for the memory.
    """
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        settings = GKAConfig(
            **{
                "max_position_embeddings": config.data.sequence_length,
                **{key: value for key, value in config.model.items() if key != "start"},
                "vocab_size": vocabulary_size(tokenizer),
                "pad_token_id": pad,
                **special,
            }
        )
        _check_memory(fewest_parameters(settings))
        set_seed(config.training.seed)
        model = GKAForCausalLM(settings)
    except (TypeError, ValueError, MemoryError) as error:
        raise InputError(f"[model]: {error}") from error
    if config.model.get("start"):
        start_from(model, str(config.model["start"]))
    recompute_layers(model, config.training.gradient_checkpointing)
    return model


def _check_memory(parameters: int) -> None:
    """Raise `InputError` if this number of float32 parameters exceeds the machine's memory."""
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * parameters > there:
        raise InputError(
            f"{parameters:.3g} parameters or more take {parameters * 4 / 2**30:.3g} GiB, and this machine "
            f"has {there / 2**30:.3g} GiB; lower hidden_size, num_hidden_layers or the vocabulary"
        )


def pack_text(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> PackedTokens:
    """The packed tokens of a run's text, from the cache if it has them; shows progress.

    Raises:
        InputError: the text cannot be used.
    """
    documents = find_documents(data.text, data.glob, hashed=data.hash_sources)
    what = "text" if data.text else "Python's standard library"
    done = iter(range(1, len(documents) + 1))
    with status(console, f"reading {what}") as change:
        packed = pack(
            documents,
            tokenizer,
            on_document=lambda _: change(f"tokenising {next(done)} of {len(documents)}"),
        )
    console.print(
        f"{what}: {packed.description['bytes']:,} bytes in {len(documents):,} documents, "
        f"{packed.description['tokens']:,} tokens",
        highlight=False,
    )
    return packed


def _metrics(
    config: RunConfig,
    trainer: DecoderTrainer,
    packed: PackedTokens,
    blocks: tuple[TokenBlocks, TokenBlocks],
) -> dict[str, Any]:
    noted = curves(trainer.state.log_history)
    held, last = blocks[1].part, noted["training"][-1]
    for row in noted["evaluation"]:
        row["bits_per_byte"] = bits_per_byte(row["loss"], held.tokens, held.bytes)
    length, processes = config.data.sequence_length, trainer.args.world_size
    tokens = last["step"] * tokens_of_a_step(config.training, length, processes)
    model: Any = trainer.model
    return {
        "config": config.tables(),
        "model": {
            "mixers": mixers(model.config),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "data": {
            **{key: packed.description[key] for key in ("bytes", "tokens", "sha256")},
            "documents": len(packed.description["documents"]),
            "held_out_tokens": held.tokens,
            "held_out_bytes": held.bytes,
        },
        "training": {
            "steps": last["step"],
            "tokens": tokens,
            "compiled": trainer.compiled,
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
    names = {"gated-kalmanet": _version("gated-kalmanet"), "python": platform.python_version()}
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
