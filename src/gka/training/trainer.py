"""The Trainer of every run: decay, data order, held-out loss and errors of its own; and its arguments."""

import math
from collections.abc import Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from gka.errors import StorageError
from gka.layers import decayed_parameters
from gka.parallel import current
from gka.storage import storage_errors
from gka.training import checkpoints, compilation
from gka.training.config import TrainingConfig
from gka.training.guards import StepWatch
from gka.training.order import (
    EvaluationBatches,
    GivenOrder,
    ShuffledOrder,
    TrainingBatches,
    targets_of,
)
from gka.training.saving import ADVICE, discard_unsealed


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
        watch: notes each step's loss and gradient norm for the guards.

    A data set with `ordered` is read in its order; `collate` of the data sets makes their batches.
    """

    compiled: str = compilation.OFF
    watch: StepWatch | None = None

    @property
    def readers(self) -> tuple[int, int]:
        """How many ranks read different blocks, and which of them this one is."""
        return self.args.world_size, self.args.process_index

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The Trainer's step of one batch; the loss is a copy where CUDA graphs would overwrite it."""
        if self.compiled != compilation.CUDA_GRAPHS:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            torch.compiler.cudagraph_mark_step_begin()
            loss = super().training_step(model, inputs, num_items_in_batch).clone()
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
        return current().gather(value)

    def _held_out_loss(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        """A batch's mean loss, uncompiled."""
        compiled = self.compiled != compilation.OFF
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with torch.no_grad(), eager:
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            return float(loss.double())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with storage_errors(f"checkpoint {folder}", advice=ADVICE):
                super()._save_checkpoint(model, trial)
        except StorageError:
            discard_unsealed(folder)
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
        # The guards replace losses that are not finite (`StepWatch`). Print nothing of the Trainer's own.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        prediction_loss_only=True,
        dataloader_num_workers=config.loader_workers,
        remove_unused_columns=False,  # data sets yield the models' arguments
        dataloader_pin_memory=torch.cuda.is_available(),
    )
