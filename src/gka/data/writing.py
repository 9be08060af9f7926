"""One part to one shard: tokenised into draft files, which get their names when they are complete."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from gka.data.packed import INDEX, TOKENS, Shard, key_of
from gka.data.sources import Part, rows_of
from gka.data.text import Encoder, check_unchanged
from gka.errors import InputError
from gka.storage import DRAFT, read_json, storage_errors, umask, write_json

DONE = ".json"
"""Suffix of a shard's facts, written last: without them a shard is not done."""

ADVICE = (
    "finished parts are kept: free space and run again to go on, or set GKA_CACHE to another folder"
)

Told = Callable[[int], None]
"""Function of the number of bytes of text just tokenised."""


def write_part(
    folder: Path, part: Part, encode: Encoder, column: str, told: Told = lambda _: None
) -> Shard:
    """Tokenise `part` into `folder`; memory use does not grow with the part.

    Raises:
        InputError: a source cannot be read or was changed meanwhile.
        StorageError: the shard cannot be written; nothing of it is left.
    """
    with storage_errors(f"packed tokens in {folder}", advice=ADVICE):
        with _draft(folder, part.name + TOKENS) as file:
            digest, table, skipped = hashlib.sha256(), [], 0
            for name, pieces in _documents(part, column):
                tokens = size = 0
                for text in pieces:
                    length = _bytes_of(text, name)
                    ids = encode(text)
                    file.write(ids.data)
                    digest.update(ids.data)
                    tokens, size = tokens + len(ids), size + length
                    told(length)
                if not size:
                    skipped += 1
                    continue
                end = np.asarray([encode.end], encode.dtype).data
                file.write(end)
                digest.update(end)
                table.append((tokens + 1, size, key_of(name)))
        facts = len(table), sum(row[1] for row in table), skipped, digest.hexdigest()
        index = write_index(folder, part.name, table)
        count = sum(row[0] for row in table)
        shard = Shard(part.name, part.size, count, *facts, index)
        write_json(folder / (part.name + DONE), asdict(shard))
    return shard


def write_index(folder: Path, name: str, table: list[tuple[int, int, int]]) -> str:
    """Write a shard's index from rows (tokens, bytes, key); returns its SHA-256."""
    columns = [np.asarray([row[i] for row in table], np.uint64) for i in range(3)]
    content = np.stack(columns).tobytes()
    with _draft(folder, name + INDEX) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def finished(folder: Path, part: Part) -> Shard | None:
    """The facts about a part's shard in `folder`; None if it is not done."""
    path = folder / (part.name + DONE)
    if not path.is_file():
        return None
    try:
        return Shard(**read_json(path))
    except (InputError, TypeError):
        return None  # it is tokenised again


def clear_drafts_in(folder: Path) -> None:
    """Remove the drafts of killed processes; for the holder of the folder's lock."""
    for path in folder.glob(f"*{DRAFT}"):
        path.unlink(missing_ok=True)


def _documents(part: Part, column: str) -> Iterator[tuple[str, Iterator[str]]]:
    for piece in part.pieces:
        yield from rows_of(piece, column)
        check_unchanged(piece.file)


def _bytes_of(text: str, name: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half of a surrogate pair at character {error.start}, which no UTF-8 has"
        ) from None


@contextlib.contextmanager
def _draft(folder: Path, name: str) -> Iterator[IO[Any]]:
    """A file that is renamed to `name` when the block ends, and removed if it raises."""
    handle, draft = tempfile.mkstemp(prefix=f".{name}.", suffix=DRAFT, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o666 & ~umask())
        os.replace(draft, folder / name)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
