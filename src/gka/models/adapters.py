"""`gka.checkpoints` under its former name, for one release."""

import warnings
from importlib import import_module
from typing import Any

_RENAMED = {"ADAPTERS": "FORMATS", "Adapter": "Format", "adapter_of": "format_of"}

warnings.warn(
    "gka.models.adapters is gka.checkpoints now: ADAPTERS is FORMATS, Adapter is Format",
    DeprecationWarning,
    stacklevel=2,
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # `__path__` for one: this is no package
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gka.checkpoints"), _RENAMED.get(name, name))
