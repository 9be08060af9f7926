"""What transformers' Trainer needs of the model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gka.models import GKAForCausalLM
from gka.models.naming import CACHE_NAME
from tolerances import RELATIVE, assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]


def test_loss_is_transformers_own(build: Build, ids: Ids):
    """The loss is what transformers computes from the logits, labels of -100 and item counts included."""
    model, tokens = build(mixers=["gka", "attention"]), ids(2, 11)
    labels = tokens.clone()
    labels[0, 3:6] = -100
    for items in (None, 7, torch.tensor(7)):
        out = model(tokens, labels=labels, num_items_in_batch=items)
        reference = model.loss_function
        expected = reference(
            out.logits, labels, vocab_size=model.config.vocab_size, num_items_in_batch=items
        )
        assert_close(out.loss, expected, RELATIVE[torch.float32])


def test_logits_are_left_out_where_only_the_loss_is_needed(build: Build, ids: Ids):
    """Training with labels returns the loss alone, evaluation the logits too, unless told otherwise."""
    model, tokens = build(), ids(1, 6)
    assert model(tokens, labels=tokens).logits is not None
    assert model(tokens, labels=tokens, return_logits=False).logits is None
    assert CACHE_NAME not in model(tokens, labels=tokens)
    assert CACHE_NAME in model(tokens)
    model.train()
    assert model(tokens, labels=tokens).logits is None
    assert model(tokens, labels=tokens, return_logits=True).logits.shape == (1, 6, 97)
    assert model(tokens).logits is not None
    assert CACHE_NAME not in model(tokens)


def test_accumulated_batches_equal_one_batch(build: Build, ids: Ids):
    """With num_items_in_batch, micro-batches of different lengths add up to the whole batch's gradient."""
    model, tokens = build(mixers=["gka", "attention"]).train(), ids(4, 9)
    labels = tokens.clone()
    labels[0, 2:] = -100
    model(tokens, labels=labels).loss.backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    items = (labels[:, 1:] != -100).sum()
    for part in (slice(0, 1), slice(1, 4)):
        model(tokens[part], labels=labels[part], num_items_in_batch=items).loss.backward()
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(parts, whole, strict=True):
        assert_close(one, other, 20 * RELATIVE[torch.float32])


def test_an_adapted_head_is_respected(build: Build, ids: Ids):
    """A head that is more than its weight (here: scaled, as an adapter would) enters the loss as it is."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    model, tokens = build(), ids(2, 8)
    plain = model(tokens, labels=tokens)
    scaled = Scaled(32, 97, bias=False)
    scaled.weight = model.lm_head.weight
    model.lm_head = scaled
    out = model(tokens, labels=tokens)
    assert_close(out.logits, 3 * plain.logits, RELATIVE[torch.float32])
    expected = nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert_close(out.loss, expected, RELATIVE[torch.float32])


def test_bfloat16_autocast_trains(build: Build, ids: Ids):
    """Under autocast the loss is float32 and near the full-precision one, and so are the gradients."""
    model, tokens = build(mixers=["gka", "attention"]).train(), ids(2, 12)
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, expected, RELATIVE[torch.bfloat16])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return TrainingArguments(**settings | options)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_and_evaluates(build: Build, ids: Ids, tmp_path: Path, checkpointing: bool):
    """Trainer's steps lower the loss; accumulation and gradient checkpointing change nothing in it."""
    rows = [{"input_ids": row, "labels": row} for row in ids(1, 16).expand(12, -1)]
    losses = []
    for accumulate in (1, 2):
        options = {
            "gradient_accumulation_steps": accumulate,
            "gradient_checkpointing": checkpointing,
        }
        options["per_device_train_batch_size"] = 4 // accumulate
        model = build(mixers=["gka", "attention"], tie_word_embeddings=True)
        trainer = Trainer(
            model,
            arguments(tmp_path, **options, prediction_loss_only=True),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            eval_dataset=rows,  # pyright: ignore[reportArgumentType]
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        assert losses[-1] < before < 2 * math.log(97)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trainer_metrics_see_the_logits(build: Build, ids: Ids, tmp_path: Path):
    """With compute_metrics, evaluation hands over logits, and nothing else, for every token."""
    rows = [{"input_ids": row, "labels": row} for row in ids(4, 8)]
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["logits"] = prediction.predictions
        return {"tokens": float(prediction.label_ids.size)}

    trainer = Trainer(
        build(num_hidden_layers=1),
        arguments(tmp_path),
        eval_dataset=rows,  # pyright: ignore[reportArgumentType]
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_tokens"] == 32
    assert seen["logits"].shape == (4, 8, 97)


def test_predictions_are_logits_and_no_cache(build: Build, ids: Ids, tmp_path: Path):
    """Without labels the model returns a cache, under whatever name; Trainer leaves it out."""
    rows = [{"input_ids": row} for row in ids(4, 8)]
    trainer = Trainer(build(mixers=["gka", "attention"]), arguments(tmp_path))
    prediction: Any = trainer.predict(rows)  # pyright: ignore[reportArgumentType]
    assert prediction.predictions.shape == (4, 8, 97)


def test_attention_weights_are_refused(build: Build, ids: Ids) -> None:
    """Wrappers pass output_attentions on: False is taken, True is refused, for no weights are formed."""
    model, tokens = build(mixer="attention"), ids(1, 5)
    assert model(tokens, output_attentions=False).logits.equal(model(tokens).logits)
    with pytest.raises(ValueError, match="forms no attention weights"):
        model(tokens, output_attentions=True)
