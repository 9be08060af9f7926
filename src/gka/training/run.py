"""One training run, from text to a saved model and what there is to say about it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.data import (
    PackedTokens,
    TokenBlocks,
    find_documents,
    load_tokenizer,
    pack,
    token_blocks,
    vocabulary_size,
)
from gka.data.files import read_json, write_json
from gka.errors import InputError
from gka.training import checkpoints, report
from gka.training import folder as files
from gka.training.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

    from gka.training.callbacks import Stop


class Interrupted(Exception):
    """Training was asked to stop and did, with a checkpoint.

    Attributes:
        step: the step of the checkpoint.
        signal: number of the signal that asked.
    """

    def __init__(self, step: int, signal: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.signal = step, signal


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
        Interrupted: after SIGINT or SIGTERM, when the checkpoint is written.
    """
    files.check_output(output, resume, overwrite)
    if resume and (output / files.METRICS).exists():
        console.print(f"The run in {output} is complete; there is nothing to resume.")
        return read_json(output / files.METRICS)
    tokenizer = load_tokenizer(config.data.tokenizer)
    packed = _packed(config, tokenizer, console)
    blocks = token_blocks(packed, config.data.sequence_length, config.data.eval_fraction)
    model = build_model(config, tokenizer)
    files.begin(config, output, packed, resume=resume, overwrite=overwrite)
    trainer = _trained(config, output, model, tokenizer, blocks, console=console, resume=resume)
    metrics = _metrics(config, trainer, packed, blocks)
    if trainer.is_world_process_zero():
        files.save_model(trainer, output / files.MODEL)
        report.plot_losses(metrics, output / files.PLOT)
        write_json(output / files.METRICS, metrics)  # last: it says that the run is complete
    return metrics


def build_model(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The untrained model of a run: its weights depend on the settings and the seed alone.

    Raises:
        InputError: if the [model] table does not describe a model.
    """
    from transformers import set_seed

    from gka.models import GKAConfig, GKAForCausalLM

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
        set_seed(config.training.seed)
        model = GKAForCausalLM(settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"[model]: {error}") from error
    if config.training.gradient_checkpointing:
        # Newer transformers renamed it, and warn of the old name.
        name = "activation_checkpointing_enable"
        getattr(model, name, model.gradient_checkpointing_enable)()
    return model


def _packed(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase", console: "Console"
) -> PackedTokens:
    documents = find_documents(config.data.text, config.data.glob)
    what = "text" if config.data.text else "Python's standard library"
    with console.status(f"reading {what}") as status:
        done = iter(range(1, len(documents) + 1))
        packed = pack(
            documents,
            tokenizer,
            on_document=lambda _: status.update(f"tokenising {next(done)} of {len(documents)}"),
        )
    console.print(
        f"{what}: {packed.description['bytes']:,} bytes in {len(documents):,} documents, "
        f"{packed.description['tokens']:,} tokens",
        highlight=False,
    )
    return packed


def _trained(
    config: RunConfig,
    output: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    blocks: tuple[TokenBlocks, TokenBlocks],
    *,
    console: "Console",
    resume: bool,
) -> "Trainer":
    """Train to the end.

    Raises:
        Interrupted: if asked to stop.
    """
    from gka.training.callbacks import ProgressBar, stop_on_signals
    from gka.training.trainer import arguments

    args = arguments(config.training, output / files.CHECKPOINTS)
    last = _last_checkpoint(output, console) if resume else None
    bar = ProgressBar(console, args.train_batch_size * args.world_size * _tokens(config))
    with stop_on_signals() as stop, contextlib.closing(bar):
        trainer = _trainer(model, args, blocks, tokenizer, [*_callbacks(stop), bar])
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.signal is not None and trainer.state.global_step < config.training.max_steps:
        raise Interrupted(trainer.state.global_step, stop.signal)
    return trainer


def _last_checkpoint(output: Path, console: "Console") -> Path | None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    last = checkpoints.newest(output / files.CHECKPOINTS, say)
    say(f"resuming from {last}" if last else "no whole checkpoint: starting from step 0")
    return last


def _callbacks(stop: "Stop") -> list[Any]:
    from gka.training import callbacks

    return [
        callbacks.StopWhenAsked(stop),
        callbacks.SealCheckpoints(),
        callbacks.Stopwatch(),
        callbacks.RefuseNaN(),
    ]


def _trainer(
    model: "PreTrainedModel",
    args: "TrainingArguments",
    blocks: tuple[TokenBlocks, TokenBlocks],
    tokenizer: "PreTrainedTokenizerBase",
    callbacks: list[Any],
) -> "Trainer":
    from transformers import PrinterCallback

    from gka.training.trainer import DecoderTrainer

    trainer = DecoderTrainer(
        model=model,
        args=args,
        train_dataset=blocks[0],
        eval_dataset=blocks[1],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dictionary
    return trainer


def _tokens(config: RunConfig) -> int:
    """Tokens of a step for each block of a forward pass."""
    return config.training.gradient_accumulation * config.data.sequence_length


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
    per_step = trainer.args.train_batch_size * trainer.args.world_size * _tokens(config)
    tokens = last["step"] * per_step
    model: Any = trainer.model
    return {
        "config": config.tables(),
        "model": {
            "mixers": _mixers(model.config),
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


def _mixers(config: Any) -> str:
    """Such as "26 gka + 4 attention"."""
    names = list(config.pattern)
    return " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
