"""Whole checkpoints: sealed once everything in them is on disk, and verified before they are loaded."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from gka.data.files import read_json, sha256_of, write_json
from gka.errors import InputError
from gka.training.folder import is_main_process

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Note size and SHA-256 of every file of a checkpoint, after all of it has reached the disk.

    A checkpoint without this note was cut short while it was written.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != SEAL:
            _flush(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / SEAL, files)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is as it was sealed."""
    if not (folder / SEAL).is_file():
        return "it was cut short while being written"
    try:
        files = read_json(folder / SEAL)
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, sealed with {expected['size']}"
            if sha256_of(path) != expected["sha256"]:
                return f"the content of {name} has changed since it was sealed"
    except (InputError, KeyError, TypeError) as error:
        return f"{SEAL} is damaged ({error})"
    return None


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; None if there is none.

    Damaged ones that are newer are set aside as `damaged-checkpoint-N`, never loaded nor deleted,
    and `say` is told which and why.
    """
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if (what := fault(path)) is None:
            return path
        if is_main_process():
            say(f"{path} is not loaded: {what}; set aside as {_set_aside(path).name}")
    return None


def _set_aside(path: Path) -> Path:
    name, number = f"damaged-{path.name}", 1
    while (target := path.with_name(name)).exists():
        number += 1
        name = f"damaged-{path.name}-{number}"
    return path.rename(target)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
