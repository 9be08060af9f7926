"""Files that are either whole or absent: written beside their place, then moved into it."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gka.errors import InputError
from gka.storage import draft_file, storage_errors


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes its place when the block ends well.

    A crash leaves the old file or the new one, never a part; after an error the old one stays.

    Raises:
        StorageError: `path` cannot be written: the disk is full or read-only, say.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft_file(path) as draft:
            yield draft
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            # drafts are private; what people share should follow their umask
            os.chmod(draft, 0o666 & ~_umask())
            os.replace(draft, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all; line ends stay as they are."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: if the file is missing, not JSON (cut short, say) or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
