"""`gka.checkpoints.open` under its former name, for one release."""

import warnings
from importlib import import_module
from typing import Any

warnings.warn("gka.models.loading is gka.checkpoints.open now", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # `__path__` for one: this is no package
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gka.checkpoints.open"), name)
