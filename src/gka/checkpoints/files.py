"""The weight files of a folder: what is in them, before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gka.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and its shape."""

    file: Path
    shape: tuple[int, ...]


def inventory(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by key; reads headers only.

    Raises:
        InputError: no safetensors, a file that the index names is missing or lacks a key, or is damaged.
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
                for key in tensors.keys()  # noqa: SIM118  (it is no dictionary)
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cut short: {error}") from error


def check_stored(
    folder: Path, expected: Mapping[str, tuple[int, ...]], allowed: Iterable[str]
) -> None:
    """Compare the files of a folder with what a model needs.

    Args:
        folder: where they are.
        expected: shapes by their keys.
        allowed: patterns of further keys that do no harm.

    Raises:
        InputError: a key is missing, or left over, or has another shape; it and its file are named.
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
