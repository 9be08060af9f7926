"""Packed tokens: one flat file of ids that is mapped into memory, and a JSON file that describes it.

    tokens.bin    ids of all documents, uint16 or uint32, each document followed by the end-of-text id
    tokens.json   format, type, counts, checksum, fingerprints, and the documents with their boundaries

Both live in a folder that appears at once, when it is complete.
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

from gka.data.corpus import Document, check_unchanged, corpus_fingerprint, read_pieces
from gka.data.files import read_json, sha256_of, write_json
from gka.data.tokenizer import Encoder, fingerprint, vocabulary_size
from gka.errors import InputError
from gka.storage import clear_drafts, draft_folder, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
TOKENS, DESCRIPTION = "tokens.bin", "tokens.json"
_KEY = "[0-9a-f]{32}"  # names of packed corpora
_DAY = 86400.0


def cache_folder() -> Path:
    """Where packed corpora are kept: $GKA_CACHE, else $XDG_CACHE_HOME/gka, else ~/.cache/gka."""
    if own := os.environ.get("GKA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gka"


@dataclass(frozen=True)
class PackedTokens:
    """A corpus as ids, opened read-only.

    Attributes:
        folder: where `tokens.bin` and `tokens.json` are.
        description: the content of `tokens.json`.
        tokens: the ids, [tokens], mapped into memory.
    """

    folder: Path
    description: dict[str, Any]
    tokens: np.memmap

    @cached_property
    def boundaries(self) -> np.ndarray:
        """Where documents begin and end, int64 [documents + 1]; document i is [b_i, b_{i+1})."""
        counts = [document["tokens"] for document in self.description["documents"]]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def bytes(self) -> np.ndarray:
        """Bytes of text of each document, int64 [documents]."""
        return np.asarray([d["bytes"] for d in self.description["documents"]], np.int64)

    @property
    def checksum(self) -> str:
        """SHA-256 of the ids: the same corpus and tokenizer give the same on every machine."""
        return self.description["sha256"]

    @classmethod
    def open(cls, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> "PackedTokens":
        """Open and verify a packed corpus.

        Raises:
            InputError: if a file is missing or damaged, or was packed with another tokenizer.
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
    """The documents as packed tokens, from `cache` where sources and tokenizer have not changed.

    Args:
        documents: what `find_documents` gives.
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        cache: folder for packed corpora; `cache_folder()` if None.
        on_document: called after each document that is tokenised (for a progress bar).

    Raises:
        InputError: if a document is not UTF-8, or the cached copy is damaged.
        StorageError: if the cache cannot be written.
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
    """Remove what killed processes have left of corpora; the names without ending are of older releases."""
    clear_drafts(cache, _KEY)
    clear_drafts(cache, _KEY, suffix="", quiet=_DAY)


def _write(
    folder: Path,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    on_document: Callable[[Document], None] | None,
) -> None:
    """Tokenise into `folder` piece by piece, so that memory does not grow with the corpus."""
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
    """(ids, bytes of text) of each piece of a document, its end-of-text id last."""
    for text in read_pieces(document.path):
        yield encode(text), len(text.encode())
    yield np.asarray([encode.end], encode.dtype), 0


def _publish(fresh: Path, folder: Path) -> None:
    fresh.chmod(0o755)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process packed the same corpus first; its copy is as good.
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
