"""What transformers' Trainer needs of the model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.utils import find_labels

from gka.models import GKAForCausalLM
from gka.models.cache import CACHE_NAME
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


def test_labels_have_one_name(build: Build, ids: Ids):
    """Trainer takes every argument with "label" in its name for one that evaluation needs: there is one.
    shift_labels is refused with it: it comes with sequences split over ranks, which no layer here can run."""
    model, tokens = build(), ids(1, 5)
    assert find_labels(GKAForCausalLM) == ["labels"]
    with pytest.raises(TypeError, match="shift_labels"):
        model(tokens, labels=tokens, shift_labels=tokens)  # pyright: ignore[reportCallIssue]


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


PATTERNS = [["gka", "gka"], ["gka", "attention"], ["gated_deltanet", "swa"]]


@pytest.mark.parametrize("mixers", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8])
def test_masks_of_any_dtype_mean_the_same(
    build: Build, ids: Ids, mixers: list[str], dtype: torch.dtype
):
    """A mask of 0 and 1 gives the same bits in every dtype, with padding and without, with a cache too."""
    model, tokens = build(mixers=mixers), ids(2, 9)
    for start in (0, 4):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :start] = 0
        expected = model(tokens, attention_mask=mask, use_cache=True)
        out = model(tokens, attention_mask=mask.to(dtype), use_cache=True)
        assert out.logits.equal(expected.logits)
        longer = torch.nn.functional.pad(mask, (0, 1), value=1)
        steps = [
            model(
                ids(2, 1),
                attention_mask=longer.to(kind),
                **{CACHE_NAME: getattr(given, CACHE_NAME)},
            )
            for given, kind in ((out, dtype), (expected, torch.long))
        ]
        assert steps[0].logits.equal(steps[1].logits)


@pytest.mark.parametrize("mixers", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        [[0.0, -torch.inf, 0.0]],
        [[0.0, torch.finfo(torch.float32).min, 0.0]],
        [[1.0, 0.5, 1.0]],
        [[1.0, torch.nan, 1.0]],
        [[1, 1, 2]],
        [[-1, 0, 1]],
    ],
    ids=str,
)
def test_other_masks_are_refused(
    build: Build, ids: Ids, mixers: list[str], mask: list[list[float]]
):
    """Additive masks, weights and numbers of documents are no masks of 0 and 1: a ValueError says so."""
    with pytest.raises(ValueError, match=r"0 \(padding\) and 1 \(token\) only"):
        build(mixers=mixers)(ids(1, 3), attention_mask=torch.tensor(mask))
    if isinstance(mask[0][0], float):
        layer = build(mixers=mixers).model.layers[1].mixer
        with pytest.raises(ValueError, match=r"0 \(padding\) and 1 \(token\) only"):
            layer(torch.zeros(1, 3, 32), attention_mask=torch.tensor(mask))  # pyright: ignore


def test_the_body_refuses_attention_weights_too(build: Build, ids: Ids) -> None:
    """GKAModel takes output_attentions as wrappers pass it, and refuses True, on the configuration too."""
    body, tokens = build(mixers=["gka", "attention"]).model, ids(1, 5)
    expected = body(tokens).last_hidden_state
    assert body(tokens, output_attentions=False).last_hidden_state.equal(expected)
    with pytest.raises(ValueError, match="forms no attention weights"):
        body(tokens, output_attentions=True)


def test_statefulness_is_known_of_the_class(build: Build):
    """`_is_stateful` is True of the class, and False of a model without recurrent layers."""
    assert GKAForCausalLM._is_stateful
    assert build(mixers=["gka", "attention"])._is_stateful
    assert not build(mixers=["attention", "swa"])._is_stateful


@pytest.mark.parametrize("form", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_trainer_without_padding(build: Build, ids: Ids, tmp_path: Path, form: dict[str, bool]):
    """Trainer's steps on documents packed by its collator are those on the same documents padded."""
    rows = [
        {"input_ids": row[:n].tolist()}
        for row, n in zip(ids(6, 9), [9, 2, 5, 7, 3, 4], strict=True)
    ]

    def padded(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        parts = [torch.tensor(feature["input_ids"]) for feature in features]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(part) for part in parts], batch_first=True)
        tokens = pad(parts, batch_first=True)
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "labels": tokens.masked_fill(mask == 0, -100),
        }

    trained = []
    for collator in (padded, DataCollatorWithFlattening(return_position_ids=not form, **form)):
        model: Any = build(mixers=["gka", "attention", "swa"])
        options: Any = {"max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 0.5, "optim": "sgd"}
        options |= {"per_device_train_batch_size": 3, "data_seed": 0}
        trainer = Trainer(
            model,
            arguments(tmp_path, **options, prediction_loss_only=True),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            eval_dataset=rows[:2],  # pyright: ignore[reportArgumentType]
            data_collator=collator,  # pyright: ignore[reportArgumentType]
        )
        trainer.train()
        trained.append((trainer.evaluate()["eval_loss"], model))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-4)
    for one, other in zip(trained[0][1].parameters(), trained[1][1].parameters(), strict=True):
        assert_close(other, one, 20 * RELATIVE[torch.float32])
