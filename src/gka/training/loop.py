"""The training loop that every kind of run shares: the Trainer, its checkpoints, its interruptions."""

import contextlib
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gka.training import checkpoints
from gka.training.config import TrainingConfig

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer

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


def fit(
    model: "nn.Module",
    config: TrainingConfig,
    folder: Path,
    blocks: "tuple[Dataset, Dataset]",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    console: "Console",
    resume: bool,
    kind: "Callable[..., Trainer] | None" = None,
    settings: dict[str, Any] | None = None,
) -> "Trainer":
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
    from gka.console import lines
    from gka.training.callbacks import Estimate, ProgressBar, stop_on_signals
    from gka.training.trainer import arguments

    args = arguments(config, folder)
    last = _last_checkpoint(folder, console) if resume else None
    tokens = tokens_of_a_step(config, getattr(blocks[0], "length", 0), args.world_size)
    bar = ProgressBar(console, tokens)
    beside = [Estimate(console, len(cast(Sized, blocks[1]))), bar]
    with stop_on_signals() as stop, contextlib.closing(bar), lines(console, bar.line):
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


def _last_checkpoint(folder: Path, console: "Console") -> Path | None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    last = checkpoints.newest(folder, say)
    say(f"resuming from {last}" if last else "no whole checkpoint: starting from step 0")
    return last


def _is_at_the_end(trainer: "Trainer", checkpoint: Path, max_steps: int) -> bool:
    """Whether a checkpoint is that of the last step; if so, the trainer is put in its state.

    The Trainer would go on: in the midst of an epoch it takes a step before it asks whether it is done.
    """
    state = checkpoints.state_of(checkpoint)
    if state.global_step < max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def _callbacks(stop: "Stop") -> list[Any]:
    from gka.training import callbacks

    return [
        callbacks.StopWhenAsked(stop),
        callbacks.SealCheckpoints(),
        callbacks.Stopwatch(),
        callbacks.RefuseNaN(),
    ]


def _trainer(
    kind: "Callable[..., Trainer] | None", callbacks: list[Any], settings: dict[str, Any]
) -> "Trainer":
    from transformers import PrinterCallback

    from gka.training.trainer import DecoderTrainer

    trainer = (kind or DecoderTrainer)(callbacks=callbacks, **settings)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dictionary
    return trainer
