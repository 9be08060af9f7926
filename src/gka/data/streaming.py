"""A corpus that is tokenised while it is trained on, and of which only a part is on the disk at a time.

The shards and their order are those of `gka.data.sources` and `gka.data.order`. A shard is tokenised when it
is needed first, or ahead of that in a thread. Its ids are deleted when room is needed for others, those least
recently used first. Its index stays, so that a resumed run finds its place without tokenising what it has
passed. Processes that share the folder share the work.
"""

import contextlib
import copy
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gka.caches import cache_folder
from gka.data.order import POOL
from gka.data.packed import INDEX, TOKENS, Shard
from gka.data.packing import cache_key
from gka.data.sources import parts_of
from gka.data.text import Document, Encoder
from gka.data.writing import ADVICE, finished, write_part
from gka.errors import BusyError, InputError
from gka.storage import only_maker, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_PART, MOST_PART, PARTS = 4 << 20, 32 << 20, 16384
"""Bytes of the smallest and largest part, and the number of parts that a corpus between them has."""
STREAM = ".stream"
_WAIT = 0.1
_MAPPED = 4 * POOL


class StreamedTokens:
    """A corpus whose shards are made when they are read; used as `gka.data.PackedTokens` is.

    Args:
        documents: from `find_documents`.
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        room: bytes of ids to keep on the disk.
        cache: folder for them; `cache_folder()` if None.
        column: column of .jsonl and .parquet files with the text; "": all files are plain text.

    Raises:
        InputError: a source cannot be read, or `room` is less than what is read at a time.
    """

    spread: int | None = 1  # held-out documents come from one shard, which is ready soon
    window: int | None = 1  # a shard is a window, so that few are needed to begin

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: "PreTrainedTokenizerBase",
        room: int,
        cache: Path | None = None,
        column: str = "",
    ) -> None:
        key = cache_key(documents, tokenizer, column)
        self.folder = (cache or cache_folder()) / (key + STREAM)
        self.checksum, self.room, self.column = key, room, column
        total = sum(document.size for document in documents)
        size = min(max(total // PARTS, LEAST_PART), MOST_PART)
        self.parts = parts_of(documents, column, size)
        self._encode, self._ahead = Encoder(tokenizer), Encoder(copy.deepcopy(tokenizer))
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self._thread: threading.Thread | None = None
        # Bytes give two bytes of ids each; other tokenizers give fewer.
        needed = 4 * POOL * max(part.size for part in self.parts)
        if room < needed:
            raise InputError(
                f"{room / 2**30:.3g} GiB are too little to stream this corpus: what is trained on and what "
                f"comes next may take {needed / 2**30:.3g} GiB"
            )
        with storage_errors(f"packed tokens in {self.folder}", advice=ADVICE):
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each shard's sources."""
        return [part.size for part in self.parts]

    def index(self, number: int) -> np.ndarray:
        """int64 [3, documents] of one shard: tokens, bytes and key of each document."""
        if finished(self.folder, self.parts[number]) is None:
            self._make(number, self._encode)
        path = self.folder / (self.parts[number].name + INDEX)
        return np.fromfile(path, np.int64).reshape(3, -1)

    def shard_tokens(self, number: int) -> np.ndarray:
        """Ids of one shard [tokens], mapped into memory."""
        if number in self._mapped:
            self._mapped.move_to_end(number)
            return self._mapped[number]
        path = self._path(number)
        while True:
            if self._missing(number):
                self._make(number, self._encode)
            with contextlib.suppress(FileNotFoundError):  # another process made room just now
                os.utime(path)
                empty = not path.stat().st_size
                dtype = self._encode.dtype
                ids = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
                break
        self._mapped[number] = ids
        while len(self._mapped) > _MAPPED:
            self._mapped.popitem(last=False)
        return ids

    def expect(self, numbers: list[int]) -> None:
        """Begin to make these shards in a thread, unless one is at work."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._make_ahead, args=(list(numbers),), name="gka-stream", daemon=True
            )
            self._thread.start()

    def _make_ahead(self, numbers: list[int]) -> None:
        # An error shows where the shard is read.
        with contextlib.suppress(InputError):
            for number in numbers:
                if self._missing(number):
                    self._make(number, self._ahead)

    def _path(self, number: int) -> Path:
        return self.folder / (self.parts[number].name + TOKENS)

    def _missing(self, number: int) -> bool:
        """Whether a shard's ids are not on the disk."""
        return finished(self.folder, self.parts[number]) is None or not self._path(number).is_file()

    def _make(self, number: int, encode: Encoder) -> None:
        """Tokenise a part, or wait until another thread or process has done so."""
        part = self.parts[number]
        while self._missing(number):
            try:
                with only_maker(self.folder / part.name, "shard"):
                    if self._missing(number):
                        before = finished(self.folder, part)
                        self._check_same(before, write_part(self.folder, part, encode, self.column))
                        self._make_room(number)
            except BusyError:
                time.sleep(_WAIT)

    def _check_same(self, before: Shard | None, now: Shard) -> None:
        if before is not None and before != now:
            raise InputError(
                f"the text of {self.folder.name}, part {now.name}, gives other tokens than before; "
                "start a new run"
            )

    def _make_room(self, kept: int) -> None:
        """Delete ids, least recently used first, until `room` suffices."""
        found = []
        for path in self.folder.glob(f"*{TOKENS}"):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.room:
                return
            if path != self._path(kept):
                path.unlink(missing_ok=True)
                total -= size
