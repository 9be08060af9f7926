"""Steps, ridge and solver of a trained model can be changed, everywhere at once and back."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.errors import InputError
from gka.models import GKAForCausalLM, set_solver, solver_settings

Build = Callable[..., GKAForCausalLM]
CHANGES: dict[str, Any] = {"num_iter": 2, "ridge_ratio": 0.5, "solver": "adaptive"}


def logits(model: GKAForCausalLM, ids: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return model(ids(2, 80)).logits


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_every_layer(build: Build, ids: Callable[..., Tensor], name: str):
    """After `set_solver` a model computes what one built with the setting computes, and says so."""
    mixers = ["gka", "attention", "gka"]
    model, expected = build(mixers=mixers), build(mixers=mixers, **{name: CHANGES[name]})
    before = logits(model, ids)
    model.set_solver(**{name: CHANGES[name]})
    assert torch.equal(logits(model, ids), logits(expected, ids))
    assert name == "solver" or not torch.equal(before, logits(expected, ids))
    assert getattr(model.config, name) == CHANGES[name]
    assert getattr(model.model.layers[2].mixer, name) == CHANGES[name]


def test_settings_for_a_block(build: Build, ids: Callable[..., Tensor]):
    """`solver_settings` restores what each layer had, after errors too; None changes nothing."""
    model = build()
    mixer: Any = model.model.layers[1].mixer
    mixer.num_iter = 4
    before = logits(model, ids)
    with pytest.raises(RuntimeError, match="stop"), solver_settings(model, **CHANGES):
        assert not torch.equal(logits(model, ids), before)
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), before)
    with solver_settings(model):
        assert torch.equal(logits(model, ids), before)
    assert model.config.num_iter == 6 and mixer.num_iter == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iter": -1}, "num_iter must be >= 0"),
        ({"num_iter": 2.5}, "num_iter must be an int; got 2.5"),
        ({"ridge_ratio": 0.0}, "ridge_ratio must be > 0"),
        ({"ridge_ratio": float("nan")}, "ridge_ratio must be > 0"),
        (
            {"num_iter": 3, "solver": "magic"},
            "solver must be one of chebyshev, adaptive, cg; got 'magic'",
        ),
    ],
)
def test_bad_settings_change_nothing(build: Build, changes: dict[str, Any], message: str):
    """A value out of range is refused before anything is set."""
    model = build()
    with pytest.raises(InputError, match=message):
        set_solver(model, **changes)
    assert model.config.num_iter == 6 and model.config.solver == "chebyshev"


def test_models_without_gka_layers_are_refused(build: Build):
    """Nothing is accepted and ignored: a model without a ridge has no solver to set."""
    with pytest.raises(InputError, match=r"num_iter: the model has no GKA layer .*attention, gla"):
        set_solver(build(mixers=["gla", "attention"]), num_iter=3)


def test_blocks_of_two_threads_do_not_mix(build: Build):
    """While one thread is inside `solver_settings`, another one's change is refused; one thread's blocks
    nest, and in the end a model has what it had."""
    model, entered, ready = build(), threading.Event(), threading.Event()

    def other() -> int:
        with solver_settings(model, num_iter=5), solver_settings(model, num_iter=4):
            entered.set()
            assert ready.wait(30)
        return model.config.num_iter

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(other)
        assert entered.wait(30)
        try:
            with pytest.raises(InputError, match="another thread is inside solver_settings"):
                set_solver(model, num_iter=9)
            with (
                pytest.raises(InputError, match="another thread is inside"),
                solver_settings(model, num_iter=9),
            ):
                pass
            assert model.config.num_iter == 4
            with solver_settings(build(), num_iter=9):  # another model is another matter
                pass
        finally:
            ready.set()
        assert found.result() == 6
    with solver_settings(model, num_iter=9):
        assert model.config.num_iter == 9
    assert model.config.num_iter == 6
