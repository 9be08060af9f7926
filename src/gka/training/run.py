"""One training run, from text to a saved model and what there is to say about it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from gka.storage import write_json
from gka.training import folder as files
from gka.training import report
from gka.training.config import DataConfig, RunConfig
from gka.training.loop import Interrupted, fit, tokens_of_a_step

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

__all__ = ["Interrupted", "build_model", "train"]


def train(
    config: RunConfig,
    output: Path,
    *,
    console: "Console",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a model and leave everything about it in `output`; the metrics are returned.

    Args:
        config: the run.
        output: folder of the run; must be new or empty, unless `resume` or `overwrite`.
        console: where progress is shown.
        resume: go on from the newest whole checkpoint in `output` (from the start if there is none).
        overwrite: delete the run that is in `output` first.

    Raises:
        InputError: if anything given cannot be used; nothing is deleted or overwritten then.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, when the checkpoint is written.
    """
    with files.open_output(output, console, resume=resume, overwrite=overwrite) as complete:
        if complete is not None:
            return complete
        return _train(config, output, console, resume, overwrite)


def _train(
    config: RunConfig, output: Path, console: "Console", resume: bool, overwrite: bool
) -> dict[str, Any]:
    """`train`, in a folder that is this process's alone."""
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
        report.plot_losses(metrics, output / files.PLOT)
        write_json(output / files.METRICS, metrics)  # last: it says that the run is complete
    return metrics


def _introduce(
    config: RunConfig, model: "PreTrainedModel", output: Path, console: "Console"
) -> None:
    """Say what is going to be done, before it takes its time."""
    training, tokens = config.training, config.data.sequence_length
    blocks = training.batch_size * training.gradient_accumulation
    console.print(
        f"model: {mixers(model.config)}, {model.num_parameters():,} parameters; "
        f"{training.max_steps:,} steps of {blocks} x {tokens} tokens, into {output}",
        highlight=False,
        soft_wrap=True,
    )


def build_model(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The untrained model of a run: its weights depend on the settings and the seed alone.

    Raises:
        InputError: if the [model] table does not describe a model.
    """
    from transformers import set_seed

    from gka.models import GKAConfig, GKAForCausalLM
    from gka.models.checks import fewest_parameters
    from gka.training.trainer import recompute_layers

    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        settings = GKAConfig(
            **{
                "max_position_embeddings": config.data.sequence_length,
                **config.model,
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
    if config.training.gradient_checkpointing:
        recompute_layers(model)
    return model


def _check_memory(parameters: int) -> None:
    """Raise `InputError` if so many float32 numbers are more than this machine's memory."""
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * parameters > there:
        raise InputError(
            f"{parameters:.3g} parameters or more take {parameters * 4 / 2**30:.3g} GiB, and this machine "
            f"has {there / 2**30:.3g} GiB; lower hidden_size, num_hidden_layers or the vocabulary"
        )


def pack_text(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", console: "Console"
) -> PackedTokens:
    """The tokens of a run's text, packed if they are not yet; progress is shown.

    Raises:
        InputError: if the text cannot be used.
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
    trainer: "Trainer",
    packed: PackedTokens,
    blocks: tuple[TokenBlocks, TokenBlocks],
) -> dict[str, Any]:
    curves = report.curves(trainer.state.log_history)
    held, last = blocks[1].part, curves["training"][-1]
    for row in curves["evaluation"]:
        row["bits_per_byte"] = report.bits_per_byte(row["loss"], held.tokens, held.bytes)
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
            "seconds": last["seconds"],
            "tokens_per_second": tokens / last["seconds"],
            "loss": last["loss"],
        },
        "evaluation": curves["evaluation"][-1],
        "curves": curves,
        "versions": report.versions(),
        "hardware": report.hardware(),
    }


def mixers(config: Any) -> str:
    """Such as "26 gka + 4 attention"."""
    names = list(config.pattern)
    return " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
