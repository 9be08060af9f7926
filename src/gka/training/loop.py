"""The training loop of every run: the Trainer, its checkpoints, interruptions."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence, Sized
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
from transformers.trainer_utils import EvalLoopOutput

from gka.console import lines
from gka.errors import InputError, StorageError
from gka.layers import decayed_parameters
from gka.models.recomputation import checkpoint_arguments
from gka.parallel import current
from gka.storage import storage_errors
from gka.training import callbacks, checkpoints, compilation
from gka.training.config import TrainingConfig
from gka.training.order import (
    EvaluationBatches,
    GivenOrder,
    ShuffledOrder,
    TrainingBatches,
    targets_of,
)


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
        trainer = _trainer(kind, [*_callbacks(stop), *shown], {
            "model": model, "args": args, "train_dataset": blocks[0], "eval_dataset": blocks[1],
            "processing_class": tokenizer, "data_collator": getattr(blocks[0], "collate", None),
            **(settings or {}),
        })  # fmt: skip
        trainer.compiled = how
        if last is None or not _is_at_the_end(trainer, last, config.max_steps):
            with compilation.compiled((model, *beside), how), losses_of_ranks():
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
    """Trainer with `SelectiveDecay` and `gka.training.order`, whose errors name the checkpoint.

    Attributes:
        compiled: what is compiled: "layers", "model", "cuda-graphs" or "off". Evaluation runs uncompiled.

    A data set with `ordered` is read in its order; `collate` of the data sets makes their batches.
    """

    compiled: str = compilation.OFF

    @property
    def readers(self) -> tuple[int, int]:
        """How many ranks read different blocks, and which of them this one is."""
        return self.args.world_size, self.args.process_index

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The Trainer's step of one batch; the loss is a copy where CUDA graphs would overwrite it."""
        if self.compiled != compilation.CUDA_GRAPHS:
            return super().training_step(model, inputs, num_items_in_batch)
        torch.compiler.cudagraph_mark_step_begin()
        return super().training_step(model, inputs, num_items_in_batch).clone()

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches of the whole run; no number of ranks changes their order."""
        args, blocks = self.args, len(cast(Sized, self.train_dataset))
        if getattr(self.train_dataset, "ordered", False):
            order = GivenOrder()
        else:
            order = ShuffledOrder(blocks, int(args.data_seed or args.seed))
        count = args.max_steps * args.gradient_accumulation_steps
        batches = TrainingBatches(order, args.per_device_train_batch_size, count, *self.readers)
        return self._loader(self.train_dataset, batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's batches of the held-out blocks."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = EvaluationBatches(len(cast(Sized, data)), size, *self.readers)
        return self._loader(data, batches)

    def _loader(self, data: Any, batches: Any) -> DataLoader:
        return DataLoader(
            data, batch_sampler=batches, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all held-out targets. Sums are added in the blocks' order, whoever had them."""
        model: Any = self._evaluated_model()
        model.eval()
        batches = cast(EvaluationBatches, dataloader.batch_sampler)
        sums = []
        for turn, inputs in enumerate(dataloader):
            loss = self._held_out_loss(model, inputs)
            if (number := batches.number(turn)) < batches.batches:
                count = targets_of(inputs)
                sums.append((number, loss * count, count))
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        every = sorted(row for rows in self._of_all_readers(sums) for row in rows)
        mean = math.fsum(row[1] for row in every) / max(1, sum(row[2] for row in every))
        metrics = {f"{metric_key_prefix}_loss": mean}
        return EvalLoopOutput(None, None, metrics, num_samples=batches.blocks)  # pyright: ignore[reportArgumentType]

    def _evaluated_model(self) -> nn.Module:
        """The model with the autocast that training runs under."""
        if not self.accelerator._models:  # never trained
            model = cast(nn.Module, self.model)
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return cast(nn.Module, self.model)

    def _of_all_readers(self, value: Any) -> list[Any]:
        """Each reader's value once."""
        if self.args.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    def _held_out_loss(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """A batch's mean loss, uncompiled."""
        compiled = self.compiled != compilation.OFF
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with torch.no_grad(), eager:
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            return float(loss.double())

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
        dataloader_num_workers=config.loader_workers,
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
