"""Priming: a pretrained Transformer becomes a hybrid, which is trained to recover its quality."""

from typing import TYPE_CHECKING, Any

from gka.training.priming.config import (
    MatchingConfig,
    PrimeConfig,
    PrimingDataConfig,
    RecoveryConfig,
    ReplacementConfig,
)

if TYPE_CHECKING:
    from gka.training.priming.run import prime

__all__ = [
    "prime",
    "PrimeConfig",
    "ReplacementConfig",
    "PrimingDataConfig",
    "MatchingConfig",
    "RecoveryConfig",
]


def __getattr__(name: str) -> Any:
    if name == "prime":
        from gka.training.priming import run

        return run.prime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
