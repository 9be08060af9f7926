"""Change the solve of a model's GKA layers after training: steps, ridge and solver."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

from torch import nn

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.models.configuration import check_range
from gka.ops.checks import check_numbers, check_solver

_lock = threading.Lock()
_blocks: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
"""The threads inside `solver_settings` for each GKA layer, one entry per nested block."""


class SolverSettings(TypedDict):
    """How the ridge systems are solved."""

    num_iter: int
    ridge_ratio: float
    solver: str


def gka_layers(model: nn.Module) -> list[GatedKalmaNet]:
    """The model's GKA layers, in order."""
    return [module for module in model.modules() if isinstance(module, GatedKalmaNet)]


def set_solver(
    model: Any,
    *,
    num_iter: int | None = None,
    ridge_ratio: float | None = None,
    solver: str | None = None,
) -> None:
    """Change how every GKA layer of `model`, and its configuration, solve (H + lambda I) x = q.

    A model was trained with one setting: fewer steps are faster and less exact, and another ridge is
    another map. The setting belongs to the model, like its weights: all its sessions and threads use it
    from the next call on.

    Args:
        model: a `GKAModel` or `GKAForCausalLM`.
        num_iter: Chebyshev steps >= 0. None: unchanged.
        ridge_ratio: a > 0 in lambda_t = a |H_t|_F. None: unchanged.
        solver: "chebyshev", "adaptive" or "cg". None: unchanged.

    Raises:
        InputError: a value is out of range, the model has no GKA layer, or another thread is inside
            `solver_settings` for it. Nothing is changed then.
    """
    given = {"num_iter": num_iter, "ridge_ratio": ridge_ratio, "solver": solver}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return
    layers = gka_layers(model)
    if not layers:
        mixers = ", ".join(sorted(set(model.config.pattern)))
        raise InputError(
            f"{', '.join(changes)}: the model has no GKA layer to set (its mixers: {mixers})"
        )
    _check(changes)
    with _lock:
        _check_no_other_thread(layers)
        for target in (*layers, model.config):
            for name, value in changes.items():
                setattr(target, name, value)


@contextmanager
def solver_settings(
    model: Any,
    *,
    num_iter: int | None = None,
    ridge_ratio: float | None = None,
    solver: str | None = None,
) -> Iterator[None]:
    """`set_solver` for a `with` block, after which each layer's previous setting is restored.

    It applies to every thread that uses the model meanwhile. A second thread with another setting is
    refused, and needs its own model.

    Raises:
        InputError: as in `set_solver`.
    """
    layers, here = gka_layers(model), threading.get_ident()
    targets = (*layers, model.config)
    with _lock:
        _check_no_other_thread(layers)
        before = [{n: getattr(x, n) for n in SolverSettings.__annotations__} for x in targets]
        for layer in layers:
            _blocks.setdefault(layer, []).append(here)
    try:
        set_solver(model, num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
        yield
    finally:
        with _lock:
            for layer in layers:
                _blocks[layer].remove(here)
            for target, values in zip(targets, before, strict=True):
                for name, value in values.items():
                    setattr(target, name, value)


def _check_no_other_thread(layers: list[GatedKalmaNet]) -> None:
    """Raise `InputError` if another thread's `solver_settings` would later undo a change made now."""
    here = threading.get_ident()
    if any(thread != here for layer in layers for thread in _blocks.get(layer, ())):
        raise InputError(
            "another thread is inside solver_settings of this model, whose end would undo the change: give "
            "each thread a model of its own (copy.deepcopy)"
        )


def _check(changes: dict[str, Any]) -> None:
    try:
        check_numbers(changes.get("ridge_ratio", 1.0), changes.get("num_iter", 0), chunk_size=1)
        for name, value in changes.items():
            check_range(name, value)
        if "solver" in changes:
            check_solver(changes["solver"])
    except (TypeError, ValueError) as error:
        raise InputError(str(error).removesuffix(".")) from None
