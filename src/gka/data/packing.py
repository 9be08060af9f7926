"""From text to packed tokens: in parts, on several processes, going on where a killed run stopped.

Finished parts gather in `NAME.unfinished` beside the corpus, which is renamed to NAME when all are there.
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gka.caches import cache_folder
from gka.data.packed import (
    FORMAT,
    INDEX,
    TOKENS,
    FormerTokens,
    PackedTokens,
    Shard,
    describe,
    write_description,
)
from gka.data.sources import Part, is_rows, parts_of
from gka.data.text import Document, Encoder, corpus_fingerprint, fingerprint, is_byte_tokenizer
from gka.data.workers import Job, tokenise
from gka.data.writing import ADVICE, DONE, clear_drafts_in, finished
from gka.errors import BusyError, InputError
from gka.storage import clear_drafts, only_maker, storage_errors, write_bytes, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = ".unfinished"
_KEY = "[0-9a-f]{32}"  # folder names of packed corpora in a cache
_DAY = 86400.0
_KEPT = 30 * _DAY
"""Seconds that an unfinished corpus of a cache is kept after its last change."""
WAIT = 0.5
WORTH = {True: 256 << 20, False: 4 << 20}
"""Bytes of text for which a second process pays, by whether ids are bytes: starting it takes seconds."""


@dataclass
class Progress:
    """How far tokenising is.

    Attributes:
        parts, done: number of parts, and of those that are done.
        size, read: bytes of the sources, and bytes of text that are tokenised.
        found: parts that an earlier run has done.
        waiting: another process that is doing the same work, in words; "" if there is none.
        converting: whether a corpus of an earlier release is converted.
    """

    parts: int = 0
    done: int = 0
    size: int = 0
    read: int = 0
    found: int = 0
    waiting: str = ""
    converting: bool = False


Show = Callable[[Progress], None]


def pack(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    cache: Path | None = None,
    show: Show = lambda _: None,
    *,
    column: str = "",
    workers: int = 0,
) -> PackedTokens:
    """The documents as packed tokens; read from `cache` if sources and tokenizer have not changed.

    A process that finds another one at the same corpus waits for it, and goes on with its work if it dies.

    Args:
        documents: from `find_documents`.
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        cache: folder for packed corpora; `cache_folder()` if None.
        show: called with the progress; from several threads, one at a time.
        column: column of .jsonl and .parquet files with the text; "": all files are plain text.
        workers: processes that tokenise; 0: as many as there are cores and enough text.

    Raises:
        InputError: a document is not UTF-8, cannot be read, has changed or has no such column, no document
            has text, or the cached copy is damaged.
        StorageError: the cache cannot be written.
    """
    cache = cache or cache_folder()
    folder = cache / cache_key(documents, tokenizer, column)
    while not folder.exists():
        with storage_errors(f"packed tokens in {cache}", advice=ADVICE):
            cache.mkdir(parents=True, exist_ok=True)
        _clear_left_overs(cache)
        try:
            make(folder, documents, tokenizer, show, column=column, workers=workers)
        except BusyError as error:
            show(Progress(waiting=str(error).split("; ")[0]))
            time.sleep(WAIT)
    return PackedTokens.open(folder, tokenizer)


def make(
    folder: Path,
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    show: Show = lambda _: None,
    *,
    column: str = "",
    workers: int = 0,
) -> None:
    """Pack the documents into `folder`, which must not exist; arguments and errors as in `pack`.

    Raises:
        BusyError: another process packs into `folder`.
        InputError: the unfinished work beside `folder` is of another text or tokenizer.
    """
    with only_maker(folder, "packed corpus"):
        if folder.exists():
            return
        unfinished = folder.with_name(folder.name + UNFINISHED)
        try:
            with storage_errors(f"packed tokens in {unfinished}", advice=ADVICE):
                unfinished.mkdir(parents=True, exist_ok=True)
                _claim(unfinished, cache_key(documents, tokenizer, column))
                clear_drafts_in(unfinished)
            shards = _shards(unfinished, documents, tokenizer, show, column, workers)
        except BaseException:
            if not any(unfinished.glob(f"*{INDEX}")):  # nothing to go on with
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        with storage_errors(f"packed tokens in {folder}", advice=ADVICE):
            _publish(unfinished, folder, shards, tokenizer, column)


def _shards(
    unfinished: Path, documents: Any, tokenizer: Any, show: Show, column: str, workers: int
) -> list[Shard]:
    """The shards of a corpus in `unfinished`, converted from an earlier release's or tokenised."""
    parts = parts_of(documents, column)
    former = unfinished.with_name(_former_key(documents, tokenizer))
    if not former.is_dir() or any(is_rows(d.path, column) for d in documents):
        return _tokenise(Job(unfinished, tokenizer, column), parts, workers, show)
    show(Progress(len(parts), converting=True))
    shards = _convert(former, unfinished, parts, tokenizer)
    shutil.rmtree(former, ignore_errors=True)
    return shards


def cache_key(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", column: str
) -> str:
    """Name of the packed corpus in a cache: it differs if sources, tokenizer or column do."""
    column = column if any(is_rows(d.path, column) for d in documents) else ""
    facts = f"{FORMAT} {corpus_fingerprint(documents)} {fingerprint(tokenizer)} {column}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def default_workers(size: int, is_bytes: bool) -> int:
    """Processes for `size` bytes of text: the cores, but fewer where starting them takes longer."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores, size // WORTH[is_bytes]))


def _tokenise(job: Job, parts: list[Part], workers: int, show: Show) -> list[Shard]:
    """The shards of all parts; those that are in the folder already are not made again."""
    shards = {part.number: shard for part in parts if (shard := finished(job.folder, part))}
    left = [part for part in parts if part.number not in shards]
    size = sum(part.size for part in parts)
    progress = Progress(len(parts), len(shards), size, found=len(shards))
    progress.read = size - sum(part.size for part in left)
    lock = threading.Lock()

    def told(size: int) -> None:
        with lock:
            progress.read += size
            show(progress)

    def done(shard: Shard) -> None:
        with lock:
            shards[int(shard.name)] = shard
            progress.done += 1
            show(progress)

    show(progress)
    if left:
        count = workers or default_workers(size, is_byte_tokenizer(job.tokenizer))
        tokenise(job, left, count, told, done)
    return [shards[part.number] for part in parts]


def _publish(
    unfinished: Path, folder: Path, shards: list[Shard], tokenizer: Any, column: str
) -> None:
    if not sum(shard.documents for shard in shards):
        shutil.rmtree(unfinished)
        raise InputError("no row has text: all are null or empty")
    write_description(unfinished, describe(tokenizer, Encoder(tokenizer).dtype, shards, column))
    unfinished.rename(folder)
    for path in (folder / _CLAIM, *(folder / (shard.name + DONE) for shard in shards)):
        path.unlink(
            missing_ok=True
        )  # after the renaming, so that a process killed here loses nothing


_CLAIM = "sources.json"


def _claim(unfinished: Path, key: str) -> None:
    """Note whose work the folder holds; what is there of other sources is refused."""
    path = unfinished / _CLAIM
    if path.is_file() and key in path.read_text():
        return
    if path.is_file():
        raise InputError(
            f"{unfinished} holds unfinished work on another text or with another tokenizer; delete it, or "
            "give another folder"
        )
    write_json(path, {"key": key})


def _clear_left_overs(cache: Path) -> None:
    """Remove abandoned work on corpora: drafts of earlier releases, and what was not touched for a month."""
    clear_drafts(cache, _KEY)
    clear_drafts(cache, _KEY, suffix="", quiet=_DAY)
    for path in cache.glob(f"*{UNFINISHED}"):
        try:
            newest = max(p.stat().st_mtime for p in (path, *path.iterdir()))
            if time.time() - newest > _KEPT:
                with only_maker(path.with_name(path.name.removesuffix(UNFINISHED))):
                    shutil.rmtree(path)
        except (OSError, InputError):
            continue  # somebody works on it, or it is another user's


def _former_key(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Name of the same corpus in the format of earlier releases."""
    facts = f"1 {corpus_fingerprint(documents)} {fingerprint(tokenizer)}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _convert(
    former: Path, unfinished: Path, parts: list[Part], tokenizer: "PreTrainedTokenizerBase"
) -> list[Shard]:
    """The shards of a corpus that an earlier release has packed; its ids are verified and copied."""
    packed = FormerTokens.open(former, tokenizer)
    index, ids, shards, at, row = packed.index(0), packed.shard_tokens(0), [], 0, 0
    for part in parts:
        rows = index[:, row : row + len(part.pieces)]
        stop = at + int(rows[0].sum())
        content, table = np.ascontiguousarray(ids[at:stop]).tobytes(), rows.tobytes()
        write_bytes(unfinished / (part.name + TOKENS), content)
        write_bytes(unfinished / (part.name + INDEX), table)
        facts = stop - at, rows.shape[1], int(rows[1].sum()), 0
        sums = hashlib.sha256(content).hexdigest(), hashlib.sha256(table).hexdigest()
        shard = Shard(part.name, part.size, *facts, *sums)
        write_json(unfinished / (part.name + DONE), vars(shard))
        shards.append(shard)
        at, row = stop, row + len(part.pieces)
    return shards
