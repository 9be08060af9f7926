"""Gated KalmaNet (arXiv 2511.21016): sequence layers whose memory is a ridge regression over the past.

Public names load at first use, so `import gka` is cheap. The layer and the ops need only torch; the models
need transformers, whose Auto classes know them whichever of the two packages is imported first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gka.discovery import announce
from gka.version import __version__ as __version__

if TYPE_CHECKING:
    from gka.layers import MIXERS, GatedKalmaNet, StateCache
    from gka.models import GKAConfig, GKAForCausalLM, GKAModel
    from gka.ops import (
        advance_states_,
        available_backends,
        chunk_gka,
        chunk_simple_gla,
        fused_recurrent_gka,
        fused_recurrent_gka_,
        last_backend,
        why_unavailable,
    )
    from gka.serving import GenerationSession

_HOMES = {
    "gka.ops": (
        "chunk_gka",
        "fused_recurrent_gka",
        "fused_recurrent_gka_",
        "advance_states_",
        "chunk_simple_gla",
        "available_backends",
        "why_unavailable",
        "last_backend",
    ),
    "gka.layers": ("GatedKalmaNet", "MIXERS", "StateCache"),
    "gka.models": ("GKAConfig", "GKAModel", "GKAForCausalLM"),
    "gka.serving": ("GenerationSession",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "chunk_gka",
    "fused_recurrent_gka",
    "fused_recurrent_gka_",
    "advance_states_",
    "chunk_simple_gla",
    "available_backends",
    "why_unavailable",
    "last_backend",
    "GatedKalmaNet",
    "MIXERS",
    "StateCache",
    "GKAConfig",
    "GKAModel",
    "GKAForCausalLM",
    "GenerationSession",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gka' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


announce()
