"""The training loop that every kind of run shares: the Trainer, its checkpoints, its interruptions."""

import contextlib
import shutil
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from gka.console import lines
from gka.errors import StorageError
from gka.layers import decayed_parameters
from gka.models.recomputation import checkpoint_arguments
from gka.storage import storage_errors
from gka.training import callbacks, checkpoints
from gka.training.config import TrainingConfig


class Interrupted(Exception):
    """Training was asked to stop and did, with a checkpoint.

    Attributes:
        step: the step of the checkpoint.
        signal: number of the signal that asked.
    """

    def __init__(self, step: int, signal: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.signal = step, signal


def fit(
    model: nn.Module,
    config: TrainingConfig,
    folder: Path,
    blocks: tuple[Dataset, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    console: Console,
    resume: bool,
    kind: Callable[..., Trainer] | None = None,
    settings: dict[str, Any] | None = None,
) -> Trainer:
    """Train `model` to the end; checkpoints lie in `folder`.

    Args:
        model: what is trained, its loss in `forward`.
        config: how.
        folder: of the checkpoints.
        blocks: to train on, and to evaluate on; both of one length, their `length`.
        tokenizer: kept beside the checkpoints.
        console: where progress is shown.
        resume: go on from the newest whole checkpoint in `folder` (from the start if there is none).
        kind: what makes the Trainer. None: `DecoderTrainer`.
        settings: further arguments of the Trainer.

    Raises:
        Interrupted: if asked to stop.
        InputError: if the loss is no longer a number.
    """
    args = arguments(config, folder)
    last = _last_checkpoint(folder, console) if resume else None
    tokens = tokens_of_a_step(config, getattr(blocks[0], "length", 0), args.world_size)
    bar = callbacks.ProgressBar(console, tokens)
    beside = [callbacks.Estimate(console, len(cast(Sized, blocks[1]))), bar]
    with callbacks.stop_on_signals() as stop, contextlib.closing(bar), lines(console, bar.line):
        trainer = _trainer(kind, [*_callbacks(stop), *beside], {
            "model": model, "args": args, "train_dataset": blocks[0], "eval_dataset": blocks[1],
            "processing_class": tokenizer, **(settings or {}),
        })  # fmt: skip
        if last is None or not _is_at_the_end(trainer, last, config.max_steps):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.signal is not None and trainer.state.global_step < config.max_steps:
        raise Interrupted(trainer.state.global_step, stop.signal)
    return trainer


def tokens_of_a_step(config: TrainingConfig, sequence_length: int, processes: int) -> int:
    """Tokens that one optimizer step reads, of all processes together."""
    return config.batch_size * config.gradient_accumulation * sequence_length * processes


def _last_checkpoint(folder: Path, console: Console) -> Path | None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    last = checkpoints.newest(folder, say)
    say(f"resuming from {last}" if last else "no whole checkpoint: starting from step 0")
    return last


def _is_at_the_end(trainer: Trainer, checkpoint: Path, max_steps: int) -> bool:
    """Whether a checkpoint is that of the last step; if so, the trainer is put in its state.

    The Trainer would go on: in the midst of an epoch it takes a step before it asks whether it is done.
    """
    state = checkpoints.state_of(checkpoint)
    if state.global_step < max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def _callbacks(stop: callbacks.Stop) -> list[Any]:
    return [
        callbacks.StopWhenAsked(stop),
        callbacks.SealCheckpoints(),
        callbacks.Stopwatch(),
        callbacks.RefuseNaN(),
    ]


def _trainer(
    kind: Callable[..., Trainer] | None, beside: list[Any], settings: dict[str, Any]
) -> Trainer:
    trainer = (kind or DecoderTrainer)(callbacks=beside, **settings)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dictionary
    return trainer


class SelectiveDecay:
    """Put before a `transformers.Trainer` or a subclass: its weight decay then leaves out what should not
    shrink (`gka.layers.decayed_parameters`). A plain Trainer chooses by names and decays `A_log`.

    Example:
        >>> class MyTrainer(SelectiveDecay, trl.SFTTrainer): ...
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay, for `create_optimizer`."""
        return decayed_parameters(model)


class DecoderTrainer(SelectiveDecay, Trainer):
    """Trainer whose weight decay leaves out what should not shrink, and whose errors name the checkpoint."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        advice = "earlier checkpoints are kept: free space, then go on with --resume"
        try:
            with storage_errors(f"checkpoint {folder}", advice=advice):
                super()._save_checkpoint(model, trial)
        except StorageError:
            if not (folder / checkpoints.SEAL).exists():
                shutil.rmtree(
                    folder, ignore_errors=True
                )  # a part of one; it takes the room that is missing
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with checkpoints.loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint):
            super()._load_rng_state(checkpoint)


def arguments(config: TrainingConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a run that keeps its checkpoints in `folder`."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        optim="adamw_torch",
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        ddp_find_unused_parameters=False,
        # bfloat16 is as good on a CPU, but the Trainer has to hear that a CPU is meant.
        use_cpu=not torch.cuda.is_available(),
        bf16=config.dtype == "bfloat16",
        logging_steps=config.log_steps,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        seed=config.seed,
        data_seed=config.seed,
        # Nothing of the Trainer's own on the screen, and no NaN hidden in an average.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        prediction_loss_only=True,
        remove_unused_columns=False,  # the data sets give what the models take
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def recompute_layers(model: PreTrainedModel, how: str) -> None:
    """Let the backward pass recompute layers as the setting `gradient_checkpointing` says."""
    arguments = checkpoint_arguments(how)
    if arguments is None:
        return
    # Newer transformers renamed it, and warn of the old name.
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)(arguments)
