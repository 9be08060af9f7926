"""Training runs: configuration, loop, results. Names that need torch are imported at first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gka.training.config import CorpusConfig, DataConfig, RunConfig, TrainingConfig
from gka.training.recipes import read_recipe

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
    "CorpusConfig",
    "TrainingConfig",
    "read_recipe",
]


_HOME = {"train": "run", "build_model": "run", "Interrupted": "loop", "SelectiveDecay": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gka.training.{_HOME[name]}"), name)
