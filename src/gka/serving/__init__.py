"""Using a trained model: sessions that are stored, copied and combined, and inspection of the memory.

Names load at first use, so that `gka --help` does not load transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gka.serving.inspection import inspect_model
    from gka.serving.session import GenerationSession
    from gka.serving.tokens import Sampling, prefill

__all__ = ["GenerationSession", "Sampling", "prefill", "inspect_model"]

_HOME = {
    "GenerationSession": "gka.serving.session",
    "Sampling": "gka.serving.tokens",
    "prefill": "gka.serving.tokens",
    "inspect_model": "gka.serving.inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gka.serving' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
