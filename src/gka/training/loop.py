"""The training loop of every run: the Trainer, its checkpoints, interruptions."""

import contextlib
import shutil
from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset
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
from gka.training import callbacks, checkpoints, compilation, guards, telemetry
from gka.training.config import TrainingConfig


class Interrupted(Exception):
    """Training stopped on a signal, after saving a checkpoint.

    Attributes:
        step: the step of the checkpoint.
        signal: number of the signal.
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
    kind: Callable[..., "DecoderTrainer"] | None = None,
    settings: dict[str, Any] | None = None,
    beside: Sequence[nn.Module] = (),
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

    Raises:
        Interrupted: a signal asked for a stop before the last step.
        InputError: the loss is not finite, the checkpoint cannot be loaded, or torch.compile failed.
    """
    args = arguments(config, folder)
    last = _last_checkpoint(folder, console) if resume else None
    tokens = tokens_of_a_step(config, getattr(blocks[0], "length", 0), args.world_size)
    bar = callbacks.ProgressBar(console, tokens)
    shown = [callbacks.Estimate(console, len(cast(Sized, blocks[1]))), bar]
    how = compilation.chosen(config.compile, args.device)
    if how != compilation.OFF:
        shown.append(compilation.FirstStep(console, how))
    elif config.compile == compilation.AUTO and args.device.type == "cuda":
        console.print(f"not compiled: {compilation.why_uncompiled(args.device)}", highlight=False)
    with callbacks.stop_on_signals() as stop, contextlib.closing(bar), lines(console, bar.line):
        watch = guards.StepWatch()
        guard = guards.Guard(config.spike_threshold, config.max_skipped)
        beside_it = [guards.SkipBadSteps(guard, watch, console), *_callbacks(stop)]
        beside_it += _writing(model, config, folder, tokens, args, watch)
        trainer = _trainer(kind, [*beside_it, *shown], {
            "model": model, "args": args, "train_dataset": blocks[0], "eval_dataset": blocks[1],
            "processing_class": tokenizer, **(settings or {}),
        })  # fmt: skip
        trainer.compiled, trainer.watch = how, watch
        if last is None or not _is_at_the_end(trainer, last, config.max_steps):
            with compilation.compiled((model, *beside), how):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stop.signal is not None and trainer.state.global_step < config.max_steps:
        raise Interrupted(trainer.state.global_step, stop.signal)
    return trainer


def tokens_of_a_step(config: TrainingConfig, sequence_length: int, processes: int) -> int:
    """Tokens per optimizer step, summed over all processes."""
    return config.batch_size * config.gradient_accumulation * sequence_length * processes


def _last_checkpoint(folder: Path, console: Console) -> Path | None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    last = checkpoints.newest(folder, say)
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
    tokens: int,
    args: TrainingArguments,
    watch: guards.StepWatch,
) -> list[Any]:
    """What is written while the run trains."""
    length = tokens // (config.batch_size * config.gradient_accumulation * args.world_size)
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


class SelectiveDecay:
    """Mixin, listed before a Trainer class: weight decay for `gka.layers.decayed_parameters` only.

    A plain Trainer chooses parameters by name and decays `A_log`.

    Example:
        >>> class MyTrainer(SelectiveDecay, trl.SFTTrainer): ...
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay, for `create_optimizer`."""
        return decayed_parameters(model)


class DecoderTrainer(SelectiveDecay, Trainer):
    """Trainer with `SelectiveDecay` whose errors name the checkpoint.

    Attributes:
        compiled: what is compiled: "layers", "model" or "off". If anything is, all training batches have one
            shape, because each shape compiles a graph: a smaller batch at the end of an epoch is left out.
            Evaluation runs uncompiled.
    """

    compiled: str = compilation.OFF
    watch: guards.StepWatch | None = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The Trainer's step of one micro-batch; its loss is noted for the guards."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.watch is None:
            return loss
        self.watch.inputs = inputs
        return self.watch.add(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.watch is not None:
            self.watch.norm = norm
        return norm

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader; if compiled, without a smaller last batch unless it is the only one."""
        smallest = self.args.per_device_train_batch_size * self.args.world_size
        before = self.args.dataloader_drop_last
        if self.compiled != compilation.OFF and len(cast(Sized, self.train_dataset)) >= smallest:
            self.args.dataloader_drop_last = True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = before

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The Trainer's step of an evaluation, uncompiled."""
        compiled = self.compiled != compilation.OFF
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        advice = "earlier checkpoints are kept: free space, then go on with --resume"
        try:
            with storage_errors(f"checkpoint {folder}", advice=advice):
                super()._save_checkpoint(model, trial)
        except StorageError:
            if not (folder / checkpoints.SEAL).exists():
                # a partial checkpoint takes up the space that is missing
                shutil.rmtree(folder, ignore_errors=True)
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
    """The Trainer's arguments for a run with checkpoints in `folder`."""
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
        # Without use_cpu the Trainer refuses bf16 on a CPU.
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
        # Keep NaN in averages, so that `RefuseNaN` sees it; print nothing of the Trainer's own.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        prediction_loss_only=True,
        remove_unused_columns=False,  # data sets yield the models' arguments
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def recompute_layers(model: PreTrainedModel, how: str) -> None:
    """Recompute layers in the backward pass as the setting `gradient_checkpointing` says."""
    arguments = checkpoint_arguments(how)
    if arguments is None:
        return
    # Newer transformers have renamed the method and warn about the old name.
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)(arguments)
