"""Packed tokens: a memory-mapped file of ids, a JSON file that describes it, and blocks of tokens.

    tokens.bin    ids of all documents, uint16 or uint32, with the end-of-text id after each document
    tokens.json   format, dtype, byte order, counts, checksum, tokenizer; tokens and bytes of each document

Their folder appears only when both are complete.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gka.data.text import (
    Document,
    Encoder,
    check_unchanged,
    corpus_fingerprint,
    fingerprint,
    read_pieces,
    vocabulary_size,
)
from gka.errors import InputError
from gka.storage import clear_drafts, draft_folder, read_json, sha256_of, storage_errors, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
TOKENS, DESCRIPTION = "tokens.bin", "tokens.json"
_KEY = "[0-9a-f]{32}"  # folder names of packed corpora
_DAY = 86400.0


def cache_folder() -> Path:
    """The folder of packed corpora: $GKA_CACHE, else $XDG_CACHE_HOME/gka, else ~/.cache/gka."""
    if own := os.environ.get("GKA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gka"


@dataclass(frozen=True)
class PackedTokens:
    """A corpus as ids, opened read-only.

    Attributes:
        folder: the folder of `tokens.bin` and `tokens.json`.
        description: the content of `tokens.json`.
        tokens: the ids [tokens], uint16 or uint32, mapped into memory.
    """

    folder: Path
    description: dict[str, Any]
    tokens: np.memmap

    @cached_property
    def boundaries(self) -> np.ndarray:
        """Boundaries b of documents, int64 [documents + 1]; document i is [b_i, b_{i+1})."""
        counts = [document["tokens"] for document in self.description["documents"]]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document, int64 [documents]."""
        return np.asarray([d["bytes"] for d in self.description["documents"]], np.int64)

    @property
    def checksum(self) -> str:
        """SHA-256 of the ids; depends on the corpus, the tokenizer and the byte order."""
        return self.description["sha256"]

    @classmethod
    def open(cls, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> "PackedTokens":
        """Open and verify a packed corpus.

        Raises:
            InputError: a file is missing or damaged, or was packed with another tokenizer.
        """
        description = read_json(folder / DESCRIPTION)
        _check_description(folder, description, tokenizer)
        path = folder / TOKENS
        if not path.is_file() or sha256_of(path) != description["sha256"]:
            raise InputError(_damaged(folder, f"{TOKENS} is missing or its checksum differs"))
        return cls(folder, description, np.memmap(path, dtype=description["dtype"], mode="r"))


def pack(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    cache: Path | None = None,
    on_document: Callable[[Document], None] | None = None,
) -> PackedTokens:
    """The documents as packed tokens; read from `cache` if sources and tokenizer have not changed.

    Args:
        documents: from `find_documents`.
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        cache: folder for packed corpora; `cache_folder()` if None.
        on_document: called after each document that is tokenised (for a progress bar).

    Raises:
        InputError: a document is not UTF-8, cannot be read or has changed, or the cached copy is damaged.
        StorageError: the cache cannot be written.
    """
    source = corpus_fingerprint(documents)
    key = hashlib.sha256(f"{FORMAT} {source} {fingerprint(tokenizer)}".encode()).hexdigest()[:32]
    folder = (cache or cache_folder()) / key
    if not folder.exists():
        advice = "free space there, or set GKA_CACHE to another folder"
        with storage_errors(f"packed tokens in {folder.parent}", advice=advice):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _clear_left_overs(folder.parent)
            with draft_folder(folder) as draft:
                _write(draft, documents, tokenizer, on_document)
                _publish(draft, folder)
    return PackedTokens.open(folder, tokenizer)


def _clear_left_overs(cache: Path) -> None:
    """Remove abandoned drafts of corpora; older releases gave them names without a suffix."""
    clear_drafts(cache, _KEY)
    clear_drafts(cache, _KEY, suffix="", quiet=_DAY)


def _write(
    folder: Path,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    on_document: Callable[[Document], None] | None,
) -> None:
    """Tokenise into `folder` piece by piece, so that memory use does not grow with the corpus."""
    encode, digest, table = Encoder(tokenizer), hashlib.sha256(), []
    with (folder / TOKENS).open("wb") as file:
        for document in documents:
            tokens = size = 0
            for ids, length in _pieces(document, encode):
                file.write(ids.data)
                digest.update(ids.data)
                tokens, size = tokens + len(ids), size + length
            check_unchanged(document)
            table.append({"name": document.name, "tokens": tokens, "bytes": size})
            if on_document is not None:
                on_document(document)
        file.flush()
        os.fsync(file.fileno())
    description = {
        "format": FORMAT,
        "dtype": encode.dtype.name,
        "byteorder": sys.byteorder,
        "tokens": sum(row["tokens"] for row in table),
        "bytes": sum(row["bytes"] for row in table),
        "sha256": digest.hexdigest(),
        "tokenizer": fingerprint(tokenizer),
        "vocabulary": vocabulary_size(tokenizer),
        "documents": table,
    }
    write_json(folder / DESCRIPTION, description)


def _pieces(document: Document, encode: Encoder):
    """(ids, UTF-8 bytes) of each piece of a document; the end-of-text id is the last piece."""
    for text in read_pieces(document.path):
        yield encode(text), len(text.encode())
    yield np.asarray([encode.end], encode.dtype), 0


def _publish(fresh: Path, folder: Path) -> None:
    fresh.chmod(0o755)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process may have packed the same corpus first; its copy is used.
        if not folder.is_dir():
            raise


def _check_description(
    folder: Path, description: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    wanted = {"format": FORMAT, "byteorder": sys.byteorder, "tokenizer": fingerprint(tokenizer)}
    for key, value in wanted.items():
        if description.get(key) != value:
            raise InputError(
                f"{folder / DESCRIPTION}: {key} is {description.get(key)!r}, expected {value!r}"
                + (" (packed with another tokenizer)" if key == "tokenizer" else "")
            )
    missing = {"dtype", "tokens", "bytes", "sha256", "documents"} - description.keys()
    if missing:
        raise InputError(_damaged(folder, f"{DESCRIPTION} lacks {', '.join(sorted(missing))}"))
    if sum(document["tokens"] for document in description["documents"]) != description["tokens"]:
        raise InputError(_damaged(folder, f"{DESCRIPTION}: document boundaries do not add up"))


def _damaged(folder: Path, what: str) -> str:
    return f"packed tokens in {folder} are damaged: {what}; delete that folder to pack them again"


@dataclass(frozen=True)
class Split:
    """Part of a packed corpus.

    Attributes:
        packed: the corpus.
        ranges: token ranges [start, stop) in reading order, int64 [ranges, 2].
        bytes: UTF-8 bytes of their text.
    """

    packed: PackedTokens
    ranges: np.ndarray
    bytes: float

    @property
    def tokens(self) -> int:
        """Number of tokens in the ranges."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())


def split(packed: PackedTokens, eval_fraction: float) -> tuple[Split, Split]:
    """Split a corpus into training and evaluation parts, by whole documents.

    Documents are held out in the order of a hash of their names until about `eval_fraction` of the tokens is
    reached, so the choice is the same on every machine. A document that is too long for that is skipped; if
    all are, the shortest is held out. If there is only one document, its end is held out, and bytes are
    counted in proportion to tokens.
    """
    counts = np.diff(packed.boundaries)
    if len(counts) == 1:
        return _cut(packed, eval_fraction)
    chosen = np.zeros(len(counts), bool)
    chosen[_held_out(packed, eval_fraction)] = True
    ranges = np.stack([packed.boundaries[:-1], packed.boundaries[1:]], axis=1)
    train, evaluation = (
        Split(packed, ranges[part], float(packed.bytes[part].sum())) for part in (~chosen, chosen)
    )
    return train, evaluation


def _held_out(packed: PackedTokens, eval_fraction: float) -> list[int]:
    """Indices of the documents to evaluate on; at least one, never all."""
    counts = np.diff(packed.boundaries)
    wanted, held, chosen = eval_fraction * float(counts.sum()), 0, []
    names = [document["name"] for document in packed.description["documents"]]
    for i in sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest()):
        if held < wanted and held + counts[i] <= 1.5 * wanted:
            chosen.append(i)
            held += counts[i]
    return chosen[: len(counts) - 1] or [int(counts.argmin())]


class TokenBlocks(Dataset):
    """Consecutive blocks of `length` tokens of a split; a last part that does not fill a block is dropped.

    Each item is {"input_ids", "labels"}, int64 [length]. Both are the same ids, because models shift labels.
    """

    def __init__(self, part: Split, length: int) -> None:
        self.part, self.length = part, length
        self._ends = np.cumsum(part.ranges[:, 1] - part.ranges[:, 0])

    def __len__(self) -> int:
        return self.part.tokens // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        ids = torch.from_numpy(self._read(index * self.length).astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def _read(self, start: int) -> np.ndarray:
        """`length` tokens from position `start` of the concatenated ranges."""
        pieces, missing = [], self.length
        row = int(np.searchsorted(self._ends, start, side="right"))
        while missing:
            low, high = self.part.ranges[row]
            begin = max(low, high - (self._ends[row] - start))
            pieces.append(self.part.packed.tokens[begin : min(high, begin + missing)])
            missing -= len(pieces[-1])
            start += len(pieces[-1])
            row += 1
        return np.concatenate(pieces)


def token_blocks(
    packed: PackedTokens, length: int, eval_fraction: float
) -> tuple[TokenBlocks, TokenBlocks]:
    """Training and evaluation blocks of `length` tokens.

    Raises:
        InputError: one of the parts is shorter than a block.
    """
    parts = split(packed, eval_fraction)
    for name, part in zip(("training", "evaluation"), parts, strict=True):
        if part.tokens < length:
            raise InputError(
                f"the {name} part of the corpus has {part.tokens} tokens, fewer than "
                f"sequence_length = {length}; give more text, a shorter sequence_length or another "
                "eval_fraction"
            )
    return TokenBlocks(parts[0], length), TokenBlocks(parts[1], length)


def _cut(packed: PackedTokens, eval_fraction: float) -> tuple[Split, Split]:
    total, size = int(packed.boundaries[-1]), float(packed.bytes.sum())
    cut = total - max(1, round(eval_fraction * total))
    parts = ((0, cut), (cut, total))
    train, evaluation = (
        Split(packed, np.asarray([part]), size * (part[1] - part[0]) / total) for part in parts
    )
    return train, evaluation
