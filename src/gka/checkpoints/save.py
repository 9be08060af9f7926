"""Write our models as folders: in a foreign format, complete or not at all, or for the Auto classes."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from gka.checkpoints.format import FORMATS, Format
from gka.errors import InputError
from gka.layers import DECAY_PARAMETERS, mixer_options
from gka.layers.parts.heads import split_heads
from gka.models.causal_lm import GKAForCausalLM
from gka.models.configuration import GKAConfig
from gka.models.fields import mixer_values
from gka.storage import draft_folder, storage_errors, umask, write_text

OURS = GKAConfig.model_type
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_MODEL_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act", "norm_eps",
    "tie_word_embeddings", "rope_options", "moe",
)  # fmt: skip
_HEADS = ("num_heads", "num_kv_heads", "num_v_heads", "num_k_heads")
_NOT_WRITTEN = ("layer_idx", "backend")
_CODE_FILE = "gka_auto.py"
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


def save_as(
    model: GKAForCausalLM,
    folder: str | os.PathLike[str],
    format: str,
    *,
    max_shard_size: str = "5GB",
    extra_files: str | os.PathLike[str] | None = None,
) -> None:
    """Write a model in a foreign format or in ours ("gka"), bit for bit.

    Float32 decay rates are written in the model's dtype if that changes no value.

    Args:
        model: the model.
        folder: must not exist, or be empty. It appears when everything is written.
        format: "gka", or a key of `gka.checkpoints.FORMATS`.
        max_shard_size: files are split above this size.
        extra_files: a folder whose other files (tokenizer, chat template) are copied.

    Raises:
        InputError: the format is unknown or cannot express the model, or the folder is in use.
        StorageError: the folder cannot be written, for example because the disk is full. Nothing is left.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty; name another folder")
    if format != OURS and format not in FORMATS:
        raise InputError(f"format {format!r} is unknown; choose {OURS}, {', '.join(FORMATS)}")
    values = None if format == OURS else foreign_config(model.config, format)
    with storage_errors(f"model {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(target) as draft:
            _fill(draft, model, values, FORMATS.get(format), max_shard_size)
            if extra_files is not None:
                _copy_others(Path(extra_files), draft)
            draft.chmod(0o777 & ~umask())
            if target.exists():
                target.rmdir()
            os.replace(draft, target)


def foreign_config(config: GKAConfig, format: str) -> dict[str, Any]:
    """The configuration in a foreign format.

    Raises:
        InputError: the format cannot express it; the message says what.
    """
    known = FORMATS[format]
    strange = sorted(set(config.pattern) - set(known.mixers))
    if strange:
        raise InputError(
            f"{format} has no {', '.join(strange)} layers, only {', '.join(sorted(known.mixers))}"
        )
    values = known.config(config)
    back = type(config).from_dict(json.loads(json.dumps(values)))
    ours, theirs = _meaning(config), _meaning(back)
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(
                f"{format} cannot express {key} = {value!r}; it would be read as {theirs[key]!r}"
            )
    return values


def _meaning(config: GKAConfig) -> dict[str, Any]:
    """All values that determine a model's function, in a canonical form."""
    meaning = {name: getattr(config, name) for name in _MODEL_FIELDS}
    meaning["pattern"] = config.pattern
    for mixer in dict.fromkeys(config.pattern):
        values = mixer_values(config, mixer)
        options = {
            k: values[k] for k in mixer_options(mixer) if k in values and k not in _NOT_WRITTEN
        }
        if "use_short_conv" in mixer_options(mixer) and not options.setdefault(
            "use_short_conv", False
        ):
            options.pop("conv_size", None)  # then it is unused
        counts = split_heads(*(options.pop(name, None) for name in _HEADS))
        for name, value in (options | dict(counts)).items():
            meaning[f"{name} of {mixer!r}"] = value
    return meaning


def _fill(
    draft: Path,
    model: GKAForCausalLM,
    values: dict[str, Any] | None,
    known: Format | None,
    size: str,
) -> None:
    if values is None or known is None:
        model.save_pretrained(draft, max_shard_size=size)
        return
    state = {name: tensor.contiguous() for name, tensor in _narrowed(model)}
    save_torch_state_dict(
        dict(known.export(model.config, state)),
        draft,
        max_shard_size=size,
        metadata={"format": "pt"},
    )
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (draft / "config.json").write_text(text, encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(draft)


def _narrowed(model: GKAForCausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.float32 and name.endswith(DECAY_PARAMETERS):
            narrow = tensor.to(model.dtype)
            tensor = narrow if torch.equal(narrow.float(), tensor) else tensor
        yield name, tensor


def _copy_others(source: Path, draft: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not (draft / file.name).exists():
            shutil.copy2(file, draft / file.name)


def write_auto_map(folder: Path | str) -> None:
    """Let `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` work without `import gka`.

    Writes `gka_auto.py`, a file of three class names, and names it under `auto_map` in config.json. The
    package must still be installed where the folder is opened, because the file imports it. After
    `import gka` the file is not run.

    Args:
        folder: folder of a model saved in this library's format.

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
    if kind != OURS:
        raise InputError(
            f"{path}: expected a model of type {OURS!r}, got {kind!r}; "
            "save it with save_pretrained first"
        )
    module = _CODE_FILE.removesuffix(".py")
    named = {auto: f"{module}.{name}" for auto, name in _CLASSES.items()}
    config["auto_map"] = (config.get("auto_map") or {}) | named
    # First the code: a config.json must not name a missing file.
    write_text(folder / _CODE_FILE, _CODE)
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
