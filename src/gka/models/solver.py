"""The solve of a model's GKA layers, changed after training: steps, ridge and solver."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from torch import nn

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.models.checks import check_range
from gka.ops.checks import check_numbers, check_solver


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
    another map.

    Args:
        model: a `GKAModel` or `GKAForCausalLM`.
        num_iter: Chebyshev steps >= 0. None: as before.
        ridge_ratio: a > 0 in lambda_t = a |H_t|_F. None: as before.
        solver: "chebyshev" or "adaptive". None: as before.

    Raises:
        InputError: a value is out of range, or the model has no GKA layer; nothing has changed.
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
    """`set_solver` for the length of a `with` block; what each layer had before comes back after it.

    Raises:
        InputError: as `set_solver`.
    """
    targets = (*gka_layers(model), model.config)
    before = [{name: getattr(x, name) for name in SolverSettings.__annotations__} for x in targets]
    set_solver(model, num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
    try:
        yield
    finally:
        for target, values in zip(targets, before, strict=True):
            for name, value in values.items():
                setattr(target, name, value)


def _check(changes: dict[str, Any]) -> None:
    try:
        check_numbers(changes.get("ridge_ratio", 1.0), changes.get("num_iter", 0), chunk_size=1)
        for name, value in changes.items():
            check_range(name, value)
        if "solver" in changes:
            check_solver(changes["solver"])
    except (TypeError, ValueError) as error:
        raise InputError(str(error).removesuffix(".")) from None
