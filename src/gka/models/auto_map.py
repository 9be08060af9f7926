"""A saved model's folder for those who let transformers run code from it, instead of `import gka`."""

import json
import os
from pathlib import Path

from gka.errors import InputError
from gka.models.configuration import GKAConfig

FILE = "gka_auto.py"
_CODE = '''"""The model of this folder for transformers' Auto classes; needs the package gated-kalmanet.

Not needed after `import gka`.
"""

import gka.models


class GKAConfig(gka.models.GKAConfig):
    """As in gka.models."""


class GKAModel(gka.models.GKAModel):
    """As in gka.models."""

    config_class = GKAConfig


class GKAForCausalLM(gka.models.GKAForCausalLM):
    """As in gka.models."""

    config_class = GKAConfig
'''
_CLASSES = {
    "AutoConfig": "GKAConfig",
    "AutoModel": "GKAModel",
    "AutoModelForCausalLM": "GKAForCausalLM",
}


def write_auto_map(folder: Path | str) -> None:
    """Let `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` work without `import gka`.

    Writes `gka_auto.py`, a file of three class names, and names it under `auto_map` in config.json. The
    package must still be installed where the folder is opened: the file imports it. After `import gka`
    nothing of it is run.

    Args:
        folder: of a model saved in this library's format.

    Raises:
        InputError: it holds no config.json of such a model.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != GKAConfig.model_type:
        raise InputError(
            f"{path}: expected a model of type {GKAConfig.model_type!r}, got {kind!r}; "
            "save it with save_pretrained first"
        )
    module = FILE.removesuffix(".py")
    named = {auto: f"{module}.{name}" for auto, name in _CLASSES.items()}
    config["auto_map"] = (config.get("auto_map") or {}) | named
    _write(folder / FILE, _CODE)  # first: a config.json must not name a file that is not there
    _write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
