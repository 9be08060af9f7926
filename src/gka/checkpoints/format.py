"""Formats of saved models: names and configurations in both directions, and checks of weight files."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gka.errors import InputError, reason_of
from gka.models.configuration import GKAConfig

Names = Mapping[str, str]
FORMATS: dict[str, "Format"] = {}
"""Every foreign format by name, in the order of registration."""
_LAYER = "model.layers."
# Keys of a foreign configuration that are copied, because they do not concern the model's mathematics.
_CARRIED = ("dtype", "torch_dtype", "quantization_config", "_commit_hash", "_name_or_path")


@dataclass(frozen=True)
class Format:
    """One foreign format. All names are prefixes of state-dict keys, ours first, theirs second.

    Attributes:
        name: the format's name in `gka convert --to`.
        model_type: the value of this key in its config.json.
        fields: converts their configuration to fields of `GKAConfig`; raises `InputError` for what those
            cannot express.
        config: the inverse, a dictionary for config.json.
        mixers: for each mixer, their name of the module and the names within it that differ.
        top: names outside the layers that differ.
        block: names within a layer, but outside mixers, that differ.
        unused: patterns of keys in their checkpoints that nothing reads.
        marks: keys of config.json that identify the format if the model type does not; one is enough.
        native: whether transformers has its own classes for it.
    """

    name: str
    model_type: str
    fields: Callable[[dict[str, Any]], dict[str, Any]]
    config: Callable[[GKAConfig], dict[str, Any]]
    mixers: Mapping[str, tuple[str, Names]]
    top: Names = field(default_factory=dict)
    block: Names = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    marks: frozenset[str] = frozenset()
    native: bool = False

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this format."""
        marked = not self.marks or not self.marks.isdisjoint(config)
        return config.get("model_type") == self.model_type and marked

    def prefixes(self, pattern: list[str]) -> list[tuple[str, str]]:
        """Every pair (our prefix, theirs) that differs in a model of this pattern, longest first."""
        pairs = list(self.top.items())
        for layer, mixer in enumerate(pattern):
            at = f"{_LAYER}{layer}."
            module, within = self.mixers[mixer]
            pairs += [(f"{at}mixer.{o}", f"{at}{module}.{t}") for o, t in within.items()]
            pairs += [(f"{at}{o}", f"{at}{t}") for o, t in self.block.items()]
            pairs.append((f"{at}mixer.", f"{at}{module}."))
        return sorted(pairs, key=lambda pair: -len(pair[0]))

    def key_mapping(self, pattern: list[str]) -> dict[str, str]:
        """Their names to ours for `from_pretrained(key_mapping=)`: patterns and replacements."""
        pairs = sorted(self.prefixes(pattern), key=lambda pair: -len(pair[1]))
        return {f"^{re.escape(theirs)}": ours for ours, theirs in pairs}

    def export(
        self, config: GKAConfig, state: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Our state dict under their names, with single experts and without a tied head."""
        pairs = self.prefixes(config.pattern)
        for name, tensor in state.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            for ours, theirs in pairs:
                if name.startswith(ours):
                    name = theirs + name.removeprefix(ours)
                    break
            yield from _each_expert(name, tensor)


def _each_expert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Split stacked experts: transformers stacks them in memory and stores them singly."""
    stem, _, part = name.rpartition(".experts.")
    if part not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for index, expert in enumerate(tensor):
        at = f"{stem}.experts.{index}."
        if part == "down_proj":
            yield at + "down_proj.weight", expert.clone()  # files cannot hold views
        else:
            gate, up = expert.chunk(2)
            yield at + "gate_proj.weight", gate.clone()
            yield at + "up_proj.weight", up.clone()


def register(*formats: Format) -> None:
    """Register formats for `from_pretrained`, `save_as` and `gka convert`.

    Raises:
        ValueError: a name is already registered.
    """
    for format in formats:
        if FORMATS.setdefault(format.name, format) is not format:
            raise ValueError(f"a format {format.name!r} is registered already")


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format of a config.json; None if it is ours or unknown."""
    return next((format for format in FORMATS.values() if format.describes(config)), None)


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `GKAConfig` from a foreign config.json; ours, or one of no known format, unchanged.

    Raises:
        InputError: `GKAConfig` cannot express the foreign configuration.
    """
    format = format_of(config)
    if format is None:
        return config
    kept = {key: config[key] for key in _CARRIED if config.get(key) is not None}
    try:
        return format.fields(config) | kept
    except InputError:
        raise
    except Exception as error:  # includes transformers' checks of its configurations
        raise InputError(
            f"config.json of a {format.name} model cannot be used: {reason_of(error)}"
        ) from error


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A stored tensor's file and shape."""

    file: Path
    shape: tuple[int, ...]


def inventory(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by key; reads only headers.

    Raises:
        InputError: there are no safetensors, or a file of the index is missing, damaged or lacks a key.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; other files are not read"
            )
        return _header(folder / SINGLE)
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is damaged: {error!r}") from error
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise InputError(f"{index} names {name}, which is missing")
        found |= _header(folder / name)
    for key, name in places.items():
        if key not in found or found[key].file.name != name:
            raise InputError(f"{folder / name} lacks {key!r}, which {INDEX} says it has")
    return found


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {
                key: Stored(file, tuple(tensors.get_slice(key).get_shape()))
                for key in tensors.keys()  # noqa: SIM118  (not a dictionary)
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cut short: {error}") from error


def check_stored(
    folder: Path, expected: Mapping[str, tuple[int, ...]], allowed: Iterable[str]
) -> None:
    """Compare a folder's tensors with those that a model needs.

    Args:
        folder: the folder.
        expected: shapes by key.
        allowed: patterns of further keys that are harmless.

    Raises:
        InputError: a key is missing, left over or has another shape; the message names it and its file.
    """
    found = inventory(folder)
    missing = sorted(set(expected) - set(found))
    if missing:
        raise InputError(f"{folder}: weights are missing: {_some(missing)}")
    extra = [k for k in found if k not in expected and not any(re.search(p, k) for p in allowed)]
    if extra:
        where = found[extra[0]].file
        raise InputError(
            f"{where} has weights that config.json does not provide for: {_some(extra)}"
        )
    for key, shape in expected.items():
        if found[key].shape != tuple(shape):
            raise InputError(
                f"{found[key].file}: {key!r} has shape {found[key].shape}, config.json implies "
                f"{tuple(shape)}"
            )


def _some(keys: list[str]) -> str:
    named = ", ".join(map(repr, keys[:3]))
    return named if len(keys) <= 3 else f"{named} and {len(keys) - 3} more"
