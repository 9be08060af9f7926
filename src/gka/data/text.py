"""Documents of a corpus, and tokenizers."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gka.errors import InputError, reason_of
from gka.storage import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Tests are a third of the library and repetitive; lib2to3 is generated tables and old grammars.
LIBRARY_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text file.

    Attributes:
        name: path within the corpus, the same on every machine.
        path: path on this machine.
        size: bytes.
        modified: time of the last change of the content (mtime), in nanoseconds.
        changed: time of the last change of the content or of the inode (ctime), in nanoseconds. Programs
            can set `modified` but not `changed`.
        inode: inode number, which differs if another file was moved to this path.
        sha256: SHA-256 of the content, or None.
    """

    name: str
    path: Path
    size: int
    modified: int
    changed: int = 0
    inode: int = 0
    sha256: str | None = None


def find_documents(text: Sequence[str], glob: str = "*", *, hashed: bool = False) -> list[Document]:
    """Documents of the files and folders in `text`, sorted by name; the standard library if `text` is empty.

    Folders are searched to any depth for files that match `glob`. Hidden and empty files are left out, and a
    file that is found twice is one document. `hashed` reads all files and sets `sha256`.

    Raises:
        InputError: a path does not exist, all files are empty, or none was found.
    """
    found = _found(text, glob)
    return [replace(d, sha256=_sha256(d.path)) for d in found] if hashed else found


def _found(text: Sequence[str], glob: str) -> list[Document]:
    if not text:
        return standard_library()
    found = [item for entry in text for item in _documents_of(Path(entry), glob)]
    return _checked(found, f"text {', '.join(map(str, text))} (files matching {glob!r})")


def standard_library() -> list[Document]:
    """Python sources of the running interpreter's standard library, without its tests.

    Raises:
        InputError: the interpreter has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [
            name for name in inner if name not in LIBRARY_WITHOUT
        ]  # installed packages are many
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [_document(path, path.relative_to(root)) for path in paths]
    return _checked(found, f"the standard library of this Python ({root})")


def corpus_fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 that differs if a source has changed.

    It covers names and checksums of hashed documents; of others names, paths, sizes, both times and inodes.
    """
    facts = [
        [d.name, d.sha256]
        if d.sha256
        else [d.name, str(d.path.resolve()), d.size, d.modified, d.changed, d.inode]
        for d in documents
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_unchanged(document: Document) -> None:
    """Raise `InputError` if a document's file was changed or replaced."""
    now = _document(document.path, Path(document.name))
    if now != replace(document, sha256=None):
        raise InputError(f"text {document.path} was changed while it was read; start again")


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about a million characters, each of whole lines.

    Line ends are kept, so the pieces have the file's bytes, except for a byte-order mark.

    Raises:
        InputError: the file cannot be read, or is not UTF-8; the message names the first wrong byte.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline()
    except UnicodeDecodeError:
        raise InputError(_wrong_encoding(path)) from None
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}") from None


def _documents_of(path: Path, glob: str) -> list[Document]:
    if path.is_file():
        return [_document(path, Path(path.name))]
    if not path.is_dir():
        raise InputError(f"text {path} does not exist; give text files or folders of them")
    names = (found.relative_to(path) for found in path.rglob(glob) if found.is_file())
    shown = (name for name in names if not any(part.startswith(".") for part in name.parts))
    return [_document(path / name, Path(path.name) / name) for name in shown]


def _document(path: Path, name: Path) -> Document:
    facts = path.stat()
    times = facts.st_mtime_ns, facts.st_ctime_ns
    return Document(name.as_posix(), path, facts.st_size, *times, facts.st_ino)


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}") from None


def _checked(documents: list[Document], what: str) -> list[Document]:
    kept = [d for d in documents if d.size]
    if not kept:
        raise InputError(f"{what}: {'only empty files' if documents else 'no files'} found")
    # A file that is found twice, by its name and in its folder, must not be both trained and evaluated on.
    once = {d.path.resolve(): d for d in reversed(kept)}
    return sorted(once.values(), key=lambda d: (d.name, str(d.path)))


def _wrong_encoding(path: Path) -> str:
    """A message with the first byte that is not UTF-8; reads again, as a text reader has no byte offset."""
    before = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"byte 0x{line[error.start]:02x} at offset {before + error.start}"
                return (
                    f"text {path} is not UTF-8 ({where}); convert it (iconv -t UTF-8) or leave it "
                    "out with glob"
                )
            before += len(line)
    return f"text {path} is not UTF-8"


BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer whose ids 0 to 255 are the bytes of UTF-8; id 256 ends a document.

    It is a byte-level BPE without merges, so `AutoTokenizer` loads it from a saved model's folder without
    this library or a network.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_printable_bytes())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        # Text that spells the end-of-text token must not become that token.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer: "bytes", a folder, or a name on the Hugging Face hub.

    Raises:
        InputError: it cannot be loaded, or has no end-of-text token to separate documents.
    """
    if name == BYTES:
        return byte_tokenizer()
    from gka.foreign_code import read_tokenizer

    try:
        tokenizer = read_tokenizer(name)
    except Exception as error:  # loaders pass on any exception of their parsers
        raise InputError(
            f"tokenizer {name!r} cannot be loaded ({reason_of(error)}); give 'bytes', a folder with a saved "
            "tokenizer, or a name on the Hugging Face hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name!r} has no end-of-text token (eos_token), which parts the documents"
        )
    return tokenizer


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of all settings that determine the ids of a text; saving and loading does not change it."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    body = core.to_str() if core is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(
        [tokenizer.eos_token_id, bool(getattr(tokenizer, "split_special_tokens", False))]
    )
    return hashlib.sha256(f"{body}\n{special}".encode()).hexdigest()


def is_byte_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the ids of a text are its bytes."""
    return fingerprint(tokenizer) == fingerprint(byte_tokenizer())


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Embeddings that a model needs: the largest id plus one, since ids can have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", model: Any, name: str) -> None:
    """Raise `InputError` if the tokenizer has ids without an embedding in the model, whose name is `name`."""
    ids, known = vocabulary_size(tokenizer), model.get_input_embeddings().num_embeddings
    if ids > known:
        raise InputError(
            f"{name}: its tokenizer has {ids} ids, the model {known}; give it the model's own"
        )


class Encoder:
    """Text to ids without special tokens; does not call the tokenizer if ids are bytes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
        self._is_bytes = is_byte_tokenizer(tokenizer)

    def __call__(self, text: str) -> np.ndarray:
        """Ids of `text` [tokens], dtype `self.dtype`."""
        if self._is_bytes:
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)
        # verbose=False: no warning that the text is longer than the tokenizer's maximal length.
        ids = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return np.asarray(ids, self.dtype)


def _printable_bytes() -> list[str]:
    """The character for each byte in byte-level vocabularies, as in GPT-2."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
