"""Stage 2: the whole hybrid, or adapters in it, learns from the text and from the teacher's predictions."""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.loss import next_token_targets, rows_of
from gka.training.priming.config import RecoveryConfig
from gka.training.trainer import DecoderTrainer

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""Linear maps that get adapters, in mixers of every kind and in MLPs."""


class RecoveryTrainer(DecoderTrainer):
    """Trainer with the training loss: the model's + kl_weight KL(teacher's predictions | model's).

    Held-out losses are the model's alone.

    Args:
        teacher: frozen, on the same device. None: no divergence.
        kl_weight: weight of the divergence, which is a mean over the predicted tokens.
        settings: the Trainer's arguments.
    """

    def __init__(self, teacher: GKAForCausalLM | None, kl_weight: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher, self.kl_weight = teacher, kl_weight

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch, as the Trainer calls it."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = inputs | {"output_hidden_states": True}
        outputs: Any
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        loss = loss + self.kl_weight * self._divergence(
            model, inputs, outputs["hidden_states"][-1], num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self, model: Any, inputs: dict[str, Any], hidden: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        assert self.teacher is not None
        predicted = next_token_targets(inputs["labels"], inputs.get("cu_seqlens")) != -100
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            with torch.no_grad():
                expected = self.teacher.model(
                    input_ids=inputs["input_ids"],
                    cu_seqlens=inputs.get("cu_seqlens"),
                    use_cache=False,
                ).last_hidden_state
            total = divergence(
                hidden[predicted], head.weight, expected[predicted], self.teacher.lm_head.weight
            )
        if num_items_in_batch is None:
            return total / predicted.sum()
        # num_items_in_batch counts the tokens of all processes, whose gradients will be averaged
        return total / num_items_in_batch * self.accelerator.num_processes


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    logits_bytes: int | None = None,
) -> Tensor:
    """Float32 sum over tokens of KL(softmax(teacher_hidden teacher_weight^T) | softmax(hidden weight^T)).

    Logits are formed for a few tokens at a time, and again in the backward pass.

    Args:
        hidden: [N,D].
        weight: [V,D].
        teacher_hidden: [N,D'].
        teacher_weight: [V,D'].
        logits_bytes: largest size of either model's logits at a time, as in `linear_cross_entropy`.
    """
    rows = rows_of(hidden, weight.shape[0], logits_bytes)
    parts = [
        checkpoint(_divergence, h, weight, t, teacher_weight, use_reentrant=False)
        for h, t in zip(hidden.split(rows), teacher_hidden.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()  # pyright: ignore[reportArgumentType, reportCallIssue]


def _divergence(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    log_p = (teacher.to(teacher_weight.dtype) @ teacher_weight.T).float().log_softmax(-1)
    log_q = (hidden.to(weight.dtype) @ weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def check_adapters(config: RecoveryConfig) -> None:
    """Raise `InputError` if adapters are asked for and `peft` is not installed."""
    if config.lora_rank and importlib.util.find_spec("peft") is None:
        raise InputError(
            f"stage2.lora_rank is {config.lora_rank}, which needs the package peft: pip install peft"
        )


def with_adapters(model: GKAForCausalLM, config: RecoveryConfig) -> Any:
    """The model as a `peft.PeftModel` with LoRA adapters of `PROJECTIONS`, which alone are trained."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import set_seed

    set_seed(config.seed)
    alpha = config.lora_alpha or 2.0 * config.lora_rank
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",  # pyright: ignore[reportArgumentType]
    )
    return get_peft_model(model, settings)
