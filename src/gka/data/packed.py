"""Packed tokens: a corpus as ids on disk, in shards that are mapped into memory when they are read.

    corpus.json      format, dtype, byte order, tokenizer, counts; size and checksum of each shard's files
    000000.tokens    ids of a shard's documents, uint16 or uint32, the end-of-text id after each document
    000000.index     int64 [3, documents]: tokens, UTF-8 bytes and key of each document
                     (key: the first 8 bytes of the SHA-256 of its name)

The folder appears only when it is complete. Opening it reads `corpus.json` and the sizes of the files, not
the tokens; `PackedTokens.verify` reads everything. Folders of earlier releases (tokens.bin, tokens.json) open
too.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gka.data.text import fingerprint
from gka.errors import InputError
from gka.storage import read_json, sha256_of, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
CORPUS, TOKENS, INDEX = "corpus.json", ".tokens", ".index"
FORMER_TOKENS, FORMER_CORPUS = "tokens.bin", "tokens.json"


@dataclass(frozen=True)
class Shard:
    """Facts about one shard.

    Attributes:
        name: of its files, without a suffix.
        size: bytes of the sources (compressed, if they are).
        tokens, documents, bytes: counts; `bytes` of UTF-8 text.
        skipped: rows left out because their text is null or empty.
        sha256: of the ids.
        index_sha256: of the index.
    """

    name: str
    size: int
    tokens: int
    documents: int
    bytes: int
    skipped: int
    sha256: str
    index_sha256: str


class Tokens(Sequence[int]):
    """The ids of all shards as one read-only sequence; a slice is an array."""

    def __init__(self, parts: Sequence[np.ndarray], dtype: np.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        self._ends = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            place = range(len(self))[place]
            return self[place : place + 1][0]
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of packed tokens has step 1, got {step}")
        found = list(self._read(start, stop)) or [np.empty(0, self.dtype)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        number = int(np.searchsorted(self._ends, start, side="right")) - 1
        while start < stop:
            begin = int(self._ends[number])
            end = min(stop, int(self._ends[number + 1]))
            if end > start:
                yield self.parts[number][start - begin : end - begin]
            start, number = max(start, end), number + 1


class PackedTokens:
    """A corpus as ids, opened read-only.

    Attributes:
        folder: where its files are.
        description: the content of `corpus.json`.
        shards: the facts about each shard.
    """

    spread: int | None = None  # held-out documents come from as many shards as needed
    window: int | None = None  # of the usual size

    def __init__(self, folder: Path, description: dict[str, Any], shards: list[Shard]) -> None:
        self.folder, self.description, self.shards = folder, description, shards
        self._mapped: dict[int, np.ndarray] = {}

    @property
    def dtype(self) -> np.dtype:
        """uint16 or uint32."""
        return np.dtype(self.description["dtype"])

    @property
    def sizes(self) -> list[int]:
        """Bytes of each shard's sources."""
        return [shard.size for shard in self.shards]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def checksum(self) -> str:
        """SHA-256 over the shards' checksums; depends on sources, tokenizer and byte order."""
        return self.description["sha256"]

    def shard_tokens(self, number: int) -> np.ndarray:
        """Ids of one shard [tokens], mapped into memory."""
        if number not in self._mapped:
            path = self.folder / (self.shards[number].name + TOKENS)
            self._mapped[number] = _mapped(path, self.dtype)
        return self._mapped[number]

    def index(self, number: int) -> np.ndarray:
        """int64 [3, documents] of one shard: tokens, bytes and key of each document."""
        path = self.folder / (self.shards[number].name + INDEX)
        return _mapped(path, np.dtype(np.int64)).reshape(3, -1)

    def expect(self, numbers: Sequence[int]) -> None:
        """Nothing: all shards are there."""

    @cached_property
    def tokens(self) -> Tokens:
        """All ids."""
        return Tokens([self.shard_tokens(i) for i in range(len(self.shards))], self.dtype)

    @cached_property
    def _indices(self) -> np.ndarray:
        return np.concatenate([self.index(i) for i in range(len(self.shards))], axis=1)

    @cached_property
    def boundaries(self) -> np.ndarray:
        """Boundaries b of documents, int64 [documents + 1]; document i is [b_i, b_{i+1})."""
        return np.concatenate([[0], np.cumsum(self._indices[0])]).astype(np.int64)

    @property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document, int64 [documents]."""
        return self._indices[1]

    @property
    def keys(self) -> np.ndarray:
        """Keys of the documents, uint64 [documents]."""
        return self._indices[2].view(np.uint64)

    def stream_checksum(self) -> str:
        """SHA-256 of all ids in order, which runs of earlier releases stored; reads everything."""
        digest = hashlib.sha256()
        for number in range(len(self.shards)):
            digest.update(self.shard_tokens(number).data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Compare every file with its checksum; reads everything.

        Raises:
            InputError: a file differs.
        """
        for shard in self.shards:
            for suffix, expected in ((TOKENS, shard.sha256), (INDEX, shard.index_sha256)):
                if sha256_of(self.folder / (shard.name + suffix)) != expected:
                    what = f"the checksum of {shard.name}{suffix} differs"
                    raise InputError(damaged(self.folder, what))

    @classmethod
    def open(cls, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> "PackedTokens":
        """Open a packed corpus. Of a folder in the present format the tokens are not read.

        Raises:
            InputError: a file is missing or has another size, the description is damaged, or the corpus was
                packed with another tokenizer.
        """
        if not (folder / CORPUS).is_file() and (folder / FORMER_CORPUS).is_file():
            return FormerTokens.open(folder, tokenizer)
        description = read_json(folder / CORPUS)
        check_description(folder / CORPUS, description, FORMAT, tokenizer)
        shards = _shards(folder, description)
        _check_sizes(folder, description, shards)
        return cls(folder, description, shards)


class FormerTokens(PackedTokens):
    """A folder of an earlier release, as a corpus of one shard; opening it reads and verifies all ids."""

    def shard_tokens(self, number: int) -> np.ndarray:
        """All ids [tokens], mapped into memory."""
        return _mapped(self.folder / FORMER_TOKENS, self.dtype)

    def index(self, number: int) -> np.ndarray:
        """int64 [3, documents], from the description."""
        table = self.description["documents"]
        keys = [np.uint64(key_of(row["name"])) for row in table]
        rows = [[row["tokens"] for row in table], [row["bytes"] for row in table]]
        return np.stack([*np.asarray(rows, np.int64), np.asarray(keys, np.uint64).view(np.int64)])

    def stream_checksum(self) -> str:
        """SHA-256 of all ids, compared when the folder was opened."""
        return self.checksum

    def verify(self) -> None:
        """Nothing: opening has verified the ids."""

    @classmethod
    def open(cls, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> "FormerTokens":
        """Open and verify; errors as in `PackedTokens.open`."""
        description = read_json(folder / FORMER_CORPUS)
        check_description(folder / FORMER_CORPUS, description, 1, tokenizer)
        missing = {"dtype", "tokens", "bytes", "sha256", "documents"} - description.keys()
        if missing:
            raise InputError(damaged(folder, f"{FORMER_CORPUS} lacks {', '.join(sorted(missing))}"))
        table = description["documents"]
        if sum(row["tokens"] for row in table) != description["tokens"]:
            raise InputError(damaged(folder, "document boundaries do not add up"))
        path = folder / FORMER_TOKENS
        if not path.is_file() or sha256_of(path) != description["sha256"]:
            raise InputError(damaged(folder, f"{FORMER_TOKENS} is missing or its checksum differs"))
        facts = description["tokens"], len(table), description["bytes"], 0, description["sha256"]
        return cls(folder, description, [Shard("tokens", description["bytes"], *facts, "")])


def describe(
    tokenizer: "PreTrainedTokenizerBase", dtype: np.dtype, shards: Sequence[Shard], column: str
) -> dict[str, Any]:
    """The content of `corpus.json`."""
    rows = [asdict(shard) for shard in shards]
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "byteorder": sys.byteorder,
        "tokenizer": fingerprint(tokenizer),
        "column": column,
        **{key: sum(row[key] for row in rows) for key in ("tokens", "bytes", "documents", "skipped")},
        "sha256": seal_of(rows),
        "shards": rows,
    }  # fmt: skip


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write `corpus.json`."""
    write_json(folder / CORPUS, description)


def seal_of(shards: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the facts about all shards."""
    return hashlib.sha256(json.dumps(list(shards), sort_keys=True).encode()).hexdigest()


def key_of(name: str) -> int:
    """The key of a document: the first 8 bytes of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8], "big")


def check_description(
    file: Path, description: dict[str, Any], form: int, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise `InputError` if a corpus is of another format, byte order or tokenizer."""
    wanted = {"format": form, "byteorder": sys.byteorder, "tokenizer": fingerprint(tokenizer)}
    for key, value in wanted.items():
        if description.get(key) != value:
            found = description.get(key)
            hint = ""
            if key == "tokenizer":
                hint = (
                    "; it was packed with another tokenizer: give that one, or pack the text anew"
                )
            raise InputError(f"{file}: {key} is {found!r}, expected {value!r}{hint}")


def damaged(folder: Path, what: str) -> str:
    """A message about a damaged corpus."""
    return f"packed tokens in {folder} are damaged: {what}; delete that folder to pack them again"


def _shards(folder: Path, description: dict[str, Any]) -> list[Shard]:
    rows = description.get("shards")
    try:
        if not rows or seal_of(rows) != description["sha256"]:
            raise ValueError("the checksum of its shards' facts differs")
        return [Shard(**row) for row in rows]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(damaged(folder, f"{CORPUS}: {error}")) from None


def _check_sizes(folder: Path, description: dict[str, Any], shards: Sequence[Shard]) -> None:
    wide = np.dtype(description["dtype"]).itemsize
    for shard in shards:
        for suffix, size in ((TOKENS, shard.tokens * wide), (INDEX, shard.documents * 24)):
            path = folder / (shard.name + suffix)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = f"has {found} bytes, expected {size}" if found is not None else "is missing"
                raise InputError(damaged(folder, f"{path.name} {what}"))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only array; an empty file cannot be mapped."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
