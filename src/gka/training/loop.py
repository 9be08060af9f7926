"""The training loop of every run: begin, resume, interruptions, what is shown."""

import contextlib
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, cast

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
from gka.errors import InputError
from gka.models.recomputation import checkpoint_arguments
from gka.parallel import current
from gka.training import callbacks, checkpoints, compilation, guards, telemetry
from gka.training.collector import frozen_heap
from gka.training.config import TrainingConfig
from gka.training.trainer import DecoderTrainer, arguments


class Interrupted(Exception):
    """Training stopped on a signal, after saving a checkpoint.

    Attributes:
        step: the step of the checkpoint.
        signal: number of the signal.
    """

    on_every_rank = True  # of a job of several processes

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
    kind: Callable[..., "DecoderTrainer"] | None = None,
    settings: dict[str, Any] | None = None,
    beside: Sequence[nn.Module] = (),
    readers: int | None = None,
) -> "DecoderTrainer":
    """Train `model` for `config.max_steps` steps and return the Trainer.

    Args:
        model: the module to train; its `forward` gives the loss.
        config: table [training].
        folder: folder of the checkpoints.
        blocks: data sets for training and evaluation; `length` is a block's number of tokens.
        tokenizer: saved in each checkpoint.
        console: where progress is shown.
        resume: continue from the newest whole checkpoint in `folder`, or from step 0 if there is none.
        kind: builds the Trainer. None: `DecoderTrainer`.
        settings: further arguments of the Trainer.
        beside: further models that the loss calls; compiled if `model` is.
        readers: ranks, or groups of ranks, that read different blocks. None: every rank is one.

    Raises:
        Interrupted: a signal asked for a stop before the last step.
        InputError: the loss is not finite, the checkpoint cannot be loaded, or torch.compile failed.
        LostRank: another process of the job has ended without a word.
    """
    args = arguments(config, folder)
    last = _last_checkpoint(folder, console) if resume else None
    readers = readers or args.world_size
    tokens = tokens_of_a_step(config, getattr(blocks[0], "length", 0), readers)
    bar = callbacks.ProgressBar(console, tokens)
    shown = [callbacks.Estimate(console, len(cast(Sized, blocks[1])) / readers), bar]
    how = compilation.chosen(config.compile, args.device)
    if how == compilation.CUDA_GRAPHS:
        alone = kind is None and isinstance(model, PreTrainedModel)
        compilation.check_graphs(config.gradient_accumulation, alone)
    if how != compilation.OFF:
        shown.append(compilation.FirstStep(console, how))
    elif config.compile == compilation.AUTO and args.device.type == "cuda":
        console.print(f"not compiled: {compilation.why_uncompiled(args.device)}", highlight=False)
    with callbacks.stop_on_signals() as stop, contextlib.closing(bar), lines(console, bar.line):
        watch = guards.StepWatch()
        guard = guards.Guard(config.spike_threshold, config.max_skipped)
        beside_it = [guards.SkipBadSteps(guard, watch, console), *_callbacks(stop)]
        beside_it += _writing(model, config, folder, (tokens, readers), args, watch)
        trainer = _trainer(kind, [*beside_it, *shown], {
            "model": model, "args": args, "train_dataset": blocks[0], "eval_dataset": blocks[1],
            "processing_class": tokenizer, "data_collator": getattr(blocks[0], "collate", None),
            **(settings or {}),
        })  # fmt: skip
        trainer.compiled, trainer.watch = how, watch
        if last is None or not _is_at_the_end(trainer, last, config.max_steps):
            compiling = compilation.compiled((model, *beside), how)
            with compiling, losses_of_ranks(), frozen_heap():
                trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.signal is not None and trainer.state.global_step < config.max_steps:
        raise Interrupted(trainer.state.global_step, stop.signal)
    return trainer


@contextlib.contextmanager
def losses_of_ranks() -> Iterator[None]:
    """Turn an error that came of the loss of another rank into one that says so.

    Raises:
        LostRank: a rank was lost.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        current().check_alive(error)
        raise


def tokens_of_a_step(config: TrainingConfig, sequence_length: int, readers: int) -> int:
    """Tokens per optimizer step, summed over all ranks that read different blocks."""
    return config.batch_size * config.gradient_accumulation * sequence_length * readers


def _last_checkpoint(folder: Path, console: Console) -> Path | None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    job = current()
    with job.together():
        last = checkpoints.newest(folder, say) if job.is_main else None
    last = job.gather(last)[0]
    say(f"resuming from {last}" if last else "no whole checkpoint: starting from step 0")
    return last


def _is_at_the_end(trainer: Trainer, checkpoint: Path, max_steps: int) -> bool:
    """Whether a checkpoint is that of the last step; if so, load it into the trainer.

    `Trainer.train` would take one step more: within an epoch it tests for the end only after a step.
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


def _writing(
    model: nn.Module,
    config: TrainingConfig,
    folder: Path,
    read: tuple[int, int],
    args: TrainingArguments,
    watch: guards.StepWatch,
) -> list[Any]:
    """What is written while the run trains; `read`: tokens of a step, and by how many readers."""
    tokens, readers = read
    length = tokens // (config.batch_size * config.gradient_accumulation * readers)
    use = telemetry.Utilisation(model, length, args.device, args.world_size)
    log = telemetry.WriteLog(folder.parent, tokens, use, config.tensorboard)
    if not config.health_steps:
        return [log]
    return [log, telemetry.WatchHealth(log, watch, config.health_steps, config.health_tokens)]


def _trainer(
    kind: Callable[..., "DecoderTrainer"] | None, beside: list[Any], settings: dict[str, Any]
) -> "DecoderTrainer":
    trainer = (kind or DecoderTrainer)(callbacks=beside, **settings)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dictionary
    return trainer


def recompute_layers(model: PreTrainedModel, how: str) -> None:
    """Recompute layers in the backward pass as the setting `gradient_checkpointing` says."""
    arguments = checkpoint_arguments(how)
    if arguments is None:
        return
    # Newer transformers have renamed the method and warn about the old name.
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)(arguments)
