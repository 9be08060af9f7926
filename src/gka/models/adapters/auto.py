"""Model types of the released hybrids, so that transformers' Auto classes open their folders."""

from typing import Any

from transformers import AutoConfig

from gka.models.adapters.hybrid import HYBRID
from gka.models.configuration import GKAConfig


def register() -> None:
    """Let `AutoConfig` know each type. What it makes is a `GKAConfig`, which the model classes know."""
    for model_type in HYBRID:
        AutoConfig.register(model_type, _stand_in(model_type), exist_ok=True)


def _stand_in(model_type: str) -> type[GKAConfig]:
    """A class that is only asked to read a dictionary."""

    def from_dict(cls: type[GKAConfig], config_dict: dict[str, Any], **options: Any) -> Any:
        return GKAConfig.from_dict(config_dict, **options)

    return type(
        model_type, (GKAConfig,), {"model_type": model_type, "from_dict": classmethod(from_dict)}
    )
