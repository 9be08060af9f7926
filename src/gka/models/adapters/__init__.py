"""Foreign checkpoints: one small table a format, so that no foreign name reaches the models."""

from typing import Any

from gka.models.adapters.adapter import Adapter
from gka.models.adapters.fla import FLA, MARKS
from gka.models.adapters.hybrid import HYBRID
from gka.models.adapters.plain import PLAIN

ADAPTERS: dict[str, Adapter] = {**HYBRID, **FLA, **PLAIN}
"""Every foreign format by name."""


def adapter_of(config: dict[str, Any]) -> Adapter | None:
    """The format of a config.json, or None if it is ours, or nobody's that is known."""
    kind = config.get("model_type")
    if kind == "gka":
        return FLA["fla"] if MARKS & set(config) else None
    if kind == "gated_deltanet":
        return FLA["fla_gated_deltanet"]
    return HYBRID.get(str(kind)) or PLAIN.get(str(kind))


__all__ = ["ADAPTERS", "PLAIN", "Adapter", "adapter_of"]
