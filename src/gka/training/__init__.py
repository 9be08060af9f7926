"""Training runs and what comes out of them. Heavy imports wait until `train` is called."""

from typing import TYPE_CHECKING, Any

from gka.training.config import DataConfig, RunConfig, TrainingConfig, read_recipe

if TYPE_CHECKING:
    from gka.training.run import Interrupted, build_model, train
    from gka.training.trainer import SelectiveDecay

__all__ = [
    "train",
    "build_model",
    "Interrupted",
    "SelectiveDecay",
    "RunConfig",
    "DataConfig",
    "TrainingConfig",
    "read_recipe",
]


def __getattr__(name: str) -> Any:
    if name in ("train", "build_model", "Interrupted"):
        from gka.training import run

        return getattr(run, name)
    if name == "SelectiveDecay":
        from gka.training.trainer import SelectiveDecay

        return SelectiveDecay
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
