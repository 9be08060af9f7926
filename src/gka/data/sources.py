"""Sources of a corpus cut into parts: whole text files, byte ranges of JSONL, row groups of Parquet.

A part is the unit of tokenising: it is done as a whole or not at all, by one process, and becomes one shard.
The parts depend on the sources alone, not on the number of processes.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from gka.data.text import Document, read_pieces
from gka.errors import InputError

LEAST_PART, MOST_PART, PARTS = 4 << 20, 256 << 20, 512
"""Bytes of the smallest and largest part, and the number of parts that a corpus between them has."""
LINES, ZIPPED, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"

Row = tuple[str, Iterator[str]]
"""A document: its name, and its text in pieces."""


@dataclass(frozen=True)
class Piece:
    """A range of one file.

    Attributes:
        file: the file.
        size: bytes of the range.
        start, stop: byte range of a JSONL file, or row groups of a Parquet file; None: the whole file.
    """

    file: Document
    size: int
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive pieces that are tokenised together.

    Attributes:
        number: from 0.
        pieces: in the order of their documents.
    """

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the sources."""
        return sum(piece.size for piece in self.pieces)

    @property
    def name(self) -> str:
        """Name of the shard's files, without a suffix."""
        return f"{self.number:06}"


def parts_of(files: Sequence[Document], column: str, size: int | None = None) -> list[Part]:
    """The parts of a corpus.

    Args:
        files: from `find_documents`.
        column: column of .jsonl and .parquet files with the text; "": all files are plain text.
        size: bytes of a part (None: a 512th of the corpus, between 4 and 256 MiB). A text file or a
            compressed file is never cut, so a part can be larger.

    Raises:
        InputError: a Parquet file cannot be read or has no such column of texts.
    """
    if size is None:
        size = min(max(sum(f.size for f in files) // PARTS, LEAST_PART), MOST_PART)
    parts, pieces, held = [], [], 0
    for piece in (piece for file in files for piece in _pieces(file, column, size)):
        if pieces and held + piece.size > size:
            parts.append(Part(len(parts), tuple(pieces)))
            pieces, held = [], 0
        pieces.append(piece)
        held += piece.size
    return [*parts, Part(len(parts), tuple(pieces))] if pieces else parts


def rows_of(piece: Piece, column: str) -> Iterator[Row]:
    """The documents of a piece. Rows whose text is null or empty have no pieces of text.

    Raises:
        InputError: a file cannot be read, is not UTF-8, a line is no JSON object, or a text is no string.
    """
    kind = _kind(piece.file.path, column)
    if kind is None:
        yield piece.file.name, read_pieces(piece.file.path)
        return
    readers: dict[str, Callable[[Piece, str], Iterator[tuple[str, Any]]]] = {
        LINES: _lines, ZIPPED: partial(_lines, opened=gzip.open), PARQUET: _parquet_rows,
    }  # fmt: skip
    for place, text in readers[kind](piece, column):
        if text is not None and not isinstance(text, str):
            found = type(text).__name__
            raise InputError(f"{place}: {column!r} is of type {found}; expected a string or null")
        yield place, iter([text] if text else [])


def is_rows(path: Path, column: str) -> bool:
    """Whether each row of a file is a document of its own."""
    return _kind(path, column) is not None


def _kind(path: Path, column: str) -> str | None:
    if not column:
        return None
    return next((end for end in (ZIPPED, LINES, PARQUET) if path.name.endswith(end)), None)


def _pieces(file: Document, column: str, size: int) -> Iterator[Piece]:
    kind = _kind(file.path, column)
    if kind == PARQUET:
        yield from _row_groups(file, column, size)
    elif kind == LINES:
        for start in range(0, file.size, size):
            stop = min(start + size, file.size)
            yield Piece(file, stop - start, start, stop)
    else:
        yield Piece(file, file.size)


def _lines(
    piece: Piece, column: str, opened: Callable[..., Any] = open
) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line that begins in the piece's range; places are byte offsets."""
    path, start = piece.file.path, piece.start or 0
    try:
        with opened(path, "rb") as file:
            at = _skip_to_line(file, start)
            while piece.stop is None or at < piece.stop:
                line = file.readline()
                if not line:
                    return
                if line.strip():
                    place = f"{piece.file.name}@{at}"
                    yield place, _value(line, column, f"{path}, line at byte {at}")
                at += len(line)
    except (OSError, EOFError) as error:
        raise InputError(f"text {path} cannot be read: {error}") from None


def _skip_to_line(file: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later; its offset."""
    if not start:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _value(line: bytes, column: str, place: str) -> Any:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 ({error.reason} at {error.start})") from None
    except ValueError as error:
        raise InputError(f"{place} is not JSON ({error}); expected an object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{place} is a {type(row).__name__}; expected a JSON object")
    if column not in row:
        raise InputError(
            f"{place} has no {column!r}; it has {', '.join(row) or 'nothing'}: name the column of the text "
            "with --column"
        )
    return row[column]


def _row_groups(file: Document, column: str, size: int) -> Iterator[Piece]:
    """Consecutive row groups of about `size` bytes (compressed, the column's alone)."""
    with _parquet(file, column) as table:
        place = table.schema_arrow.names.index(column)
        meta = table.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    leaf = _leaf_of(groups, column) if groups else place
    sizes = [group.column(leaf).total_compressed_size for group in groups]
    start = held = 0
    for number, one in enumerate(sizes):
        if held and held + one > size:
            yield Piece(file, held, start, number)
            start, held = number, 0
        held += one
    if held:
        yield Piece(file, held, start, len(sizes))


def _leaf_of(groups: list[Any], column: str) -> int:
    """Number of the leaf that holds a column; nested columns before it have several."""
    first = groups[0]
    return next(i for i in range(first.num_columns) if first.column(i).path_in_schema == column)


def _parquet_rows(piece: Piece, column: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row; places are row numbers in the file."""
    groups = range(piece.start or 0, piece.stop or 0)
    with _parquet(piece.file, column) as table:
        meta = table.metadata
        row = sum(meta.row_group(i).num_rows for i in range(groups.start))
        try:
            for batch in table.iter_batches(1024, row_groups=list(groups), columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield f"{piece.file.name}#{row}", text
                    row += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
            raise InputError(f"text {piece.file.path} cannot be read: {error}") from None


def _parquet(file: Document, column: str) -> Any:
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise InputError(
            f"text {file.path} is Parquet, which needs pyarrow: pip install 'gated-kalmanet[data]'"
        ) from None
    try:
        table = parquet.ParquetFile(file.path)
    except (OSError, ValueError) as error:
        raise InputError(f"text {file.path} is not readable Parquet: {error}") from None
    schema = table.schema_arrow
    names = schema.names
    if column not in names:
        table.close()
        raise InputError(
            f"text {file.path} has no column {column!r}; it has {', '.join(names)}: name the column of the "
            "text with --column"
        )
    kind = schema.field(column).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        table.close()
        raise InputError(f"text {file.path}: column {column!r} is {kind}; expected strings")
    return table
