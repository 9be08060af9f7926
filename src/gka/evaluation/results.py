"""Result files: written whole or not at all, read back with an error that says what is wrong."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gka.errors import InputError


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` by way of a temporary file beside it, so a reader, or a restart
    after a crash, finds the old file or the new one and never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        InputError: the file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a JSON file ({error}); move it away or choose another output folder"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def environment() -> dict[str, Any]:
    """What a reader needs to know about the machine and the versions behind a measurement."""
    return {
        "gka": version("gated-kalmanet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
