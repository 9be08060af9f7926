"""Saved models: open and write any known format.

`gka.models` knows only its own format. After `import gka`, this package is imported with `gka.models`
(`gka.discovery`), so that `from_pretrained` reads the other formats too.
"""

from typing import Any

from transformers import AutoConfig

from gka.checkpoints import formats
from gka.checkpoints.format import FORMATS, Format, format_of, register, translated
from gka.checkpoints.open import load_gka, load_model, load_with
from gka.checkpoints.save import save_as, write_auto_map
from gka.discovery import MODEL_TYPES
from gka.models.configuration import READING, GKAConfig


def _stand_in(model_type: str) -> type[GKAConfig]:
    """A class for a model type whose `from_dict` returns a `GKAConfig`."""

    def from_dict(cls: type[GKAConfig], config_dict: dict[str, Any], **options: Any) -> Any:
        return GKAConfig.from_dict(config_dict, **options)

    return type(
        model_type, (GKAConfig,), {"model_type": model_type, "from_dict": classmethod(from_dict)}
    )


READING.translate, READING.load = translated, load_with
for _name in MODEL_TYPES:
    if _name != GKAConfig.model_type:
        AutoConfig.register(_name, _stand_in(_name), exist_ok=True)

__all__ = [
    "load_model",
    "load_gka",
    "save_as",
    "write_auto_map",
    "formats",
    "FORMATS",
    "Format",
    "format_of",
    "register",
]
