"""Hugging Face's Trainer, set up for these models."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from gka.errors import StorageError
from gka.layers import decayed_parameters
from gka.storage import storage_errors
from gka.training.checkpoints import SEAL, loading
from gka.training.config import TrainingConfig


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
            if not (folder / SEAL).exists():
                shutil.rmtree(
                    folder, ignore_errors=True
                )  # a part of one; it takes the room that is missing
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
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


def recompute_layers(model: PreTrainedModel) -> None:
    """Let the backward pass compute each layer again instead of keeping what is inside it."""
    # Newer transformers renamed it, and warn of the old name.
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)()
