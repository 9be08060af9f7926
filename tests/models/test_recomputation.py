"""Selective activation checkpointing: what is run again, what is not, and that gradients do not change."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from gka.errors import InputError
from gka.models import GKAForCausalLM, keep_states, selective_checkpointing
from gka.models.recomputation import PRODUCTS, SEQUENCE_OPS, checkpoint_arguments
from gka.ops import autograd
from gka.training.config import CHECKPOINTING

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]
MIXERS = ["gka", "attention", "gated_deltanet", "gla", "deltanet", "swa"]
RMS_NORM = torch.ops.aten.rsqrt.default


class Executed(TorchDispatchMode):
    """Counts the operators that are executed, not those whose results were kept."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))

    def of(self, ops: frozenset) -> int:
        return sum(self.counts[op] for op in ops)


def checkpointed(model: GKAForCausalLM, how: str) -> GKAForCausalLM:
    arguments = checkpoint_arguments(how)
    if arguments is not None:
        name = "activation_checkpointing_enable"
        getattr(model, name, model.gradient_checkpointing_enable)(arguments)
    return model


def double(build: Build, how: str = "none") -> GKAForCausalLM:
    return checkpointed(build(mixers=MIXERS).double().train(), how)


def packed(tokens: Tensor) -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor([0, 13, tokens.shape[1]])}


def gradients(model: GKAForCausalLM, run: Any, tokens: Tensor, more: dict[str, Tensor]) -> Any:
    loss = run(input_ids=tokens, labels=tokens, use_cache=False, **more).loss
    loss.backward()
    return [p.grad for p in model.parameters()]


def executed(build: Build, ids: Ids, how: str) -> Executed:
    model, tokens = double(build, how), ids(1, 30)
    with Executed() as seen:
        gradients(model, model, tokens, {})
    return seen


def test_what_runs_again(build: Build, ids: Ids):
    """ "selective" runs norms again and no sequence operator, "selective-products" no product either; "full"
    runs all of them again."""
    plain, full, selective, products = (executed(build, ids, how) for how in CHECKPOINTING)
    assert plain.of(SEQUENCE_OPS) == selective.of(SEQUENCE_OPS) == products.of(SEQUENCE_OPS) > 0
    assert full.of(SEQUENCE_OPS) == 2 * plain.of(SEQUENCE_OPS)
    assert plain.of(PRODUCTS) == products.of(PRODUCTS) < selective.of(PRODUCTS)
    for again in (selective, products):
        assert again.counts[RMS_NORM] > plain.counts[RMS_NORM]


@pytest.mark.parametrize("more", [lambda tokens: {}, packed], ids=["whole", "packed"])
@pytest.mark.parametrize("how", CHECKPOINTING[1:])
def test_gradients_do_not_change(build: Build, ids: Ids, how: str, more: Any):
    """In float64, of every mixer, whole or packed sequences, they are those without checkpointing, bit for
    bit."""
    tokens, plain, model = ids(1, 40), double(build), double(build, how)
    expected = gradients(plain, plain, tokens, more(tokens))
    found = gradients(model, model, tokens, more(tokens))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", ["selective", "selective-products"])
def test_compiled(build: Build, ids: Ids, how: str, monkeypatch: pytest.MonkeyPatch):
    """One graph without breaks runs each solve once, on packed sequences too, with the same gradients."""
    torch.compiler.reset()
    ran: list[int] = []
    run = autograd._forward

    def counted(*call: Any) -> Any:
        ran.append(1)
        return run(*call)

    monkeypatch.setattr(autograd, "_forward", counted)
    tokens, plain, model = ids(1, 40), double(build), double(build, how)
    expected = gradients(plain, plain, tokens, packed(tokens))
    once = len(ran)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(model, compiled, tokens, packed(tokens))
    assert len(ran) == 2 * once > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_layer_compiled_alone(build: Build, ids: Ids):
    """`layer.compile()` and selective checkpointing give the gradients of neither."""
    torch.compiler.reset()
    tokens, plain, model = ids(1, 24), double(build), double(build, "selective")
    expected = gradients(plain, plain, tokens, {})
    model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
    found = gradients(model, model, tokens, {})
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_trainer_takes_it(build: Build, ids: Ids, tmp_path: Path):
    """As `gradient_checkpointing_kwargs`; the arguments it stores can be loaded again."""
    model = build(mixers=["gka", "attention"])
    rows = [{"input_ids": row, "labels": row} for row in ids(2, 12)]
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, gradient_checkpointing=True,
        gradient_checkpointing_kwargs=selective_checkpointing(), **options,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    assert model.is_gradient_checkpointing
    stored = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert stored.gradient_checkpointing_kwargs == selective_checkpointing()


def test_states_are_kept_in_every_gka_layer(build: Build, ids: Ids):
    """keep_states reaches the op in each GKA layer, which refuses it where no kernel runs, until it is taken
    back; a model without such layers refuses it itself."""
    model, tokens = build(mixers=MIXERS).train(), ids(1, 30)
    keep_states(model)
    with pytest.raises(InputError, match="keep_states=True needs the backend"):
        model(input_ids=tokens)
    keep_states(model, False)
    model(input_ids=tokens)
    with pytest.raises(InputError, match="no GKA layer"):
        keep_states(build(mixers=["attention"]))


def test_other_names_are_refused():
    """The error lists those there are."""
    with pytest.raises(ValueError, match="full, selective or selective-products; got 'some'"):
        checkpoint_arguments("some")
