"""Which documents a corpus is made of: files, folders, or Python's own standard library."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gka.errors import InputError
from gka.storage import sha256_of

# Tests are a third of the library and repeat themselves; the rest is generated tables or old grammars.
LIBRARY_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text file.

    Attributes:
        name: its path within the corpus, the same on every machine.
        path: where it is.
        size: in bytes.
        modified, changed: when its content was, and when its content or its entry in the file system was, in
            nanoseconds. Whoever sets the first back cannot set the second.
        inode: its number in the file system, another one if a file was moved to its place.
        sha256: of its content, where that was asked for.
    """

    name: str
    path: Path
    size: int
    modified: int
    changed: int = 0
    inode: int = 0
    sha256: str | None = None


def find_documents(text: Sequence[str], glob: str = "*", *, hashed: bool = False) -> list[Document]:
    """Documents of the files and folders in `text`, sorted by name; the standard library if empty.

    Folders are searched to any depth for files that match `glob`; hidden files and empty files are
    left out, and a file that is reached twice is one document. With `hashed` all of them are read, for
    their checksums.

    Raises:
        InputError: if a path does not exist, or nothing (that is not empty) was found.
    """
    found = _found(text, glob)
    return [replace(d, sha256=_sha256(d.path)) for d in found] if hashed else found


def _found(text: Sequence[str], glob: str) -> list[Document]:
    if not text:
        return standard_library()
    found = [item for entry in text for item in _documents_of(Path(entry), glob)]
    return _checked(found, f"text {', '.join(map(str, text))} (files matching {glob!r})")


def standard_library() -> list[Document]:
    """Python sources of the running interpreter's standard library, its tests left out.

    Raises:
        InputError: if the interpreter carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p for p in root.rglob("*.py") if LIBRARY_WITHOUT.isdisjoint(p.relative_to(root).parts))
    return _checked(
        [_document(path, path.relative_to(root)) for path in paths],
        f"the standard library of this Python ({root})",
    )


def corpus_fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 of what tells that a source has changed.

    That is names, places, sizes, times of modification and change, and inodes; of hashed documents names and
    checksums, wherever they lie.
    """
    facts = [
        [d.name, d.sha256]
        if d.sha256
        else [d.name, str(d.path.resolve()), d.size, d.modified, d.changed, d.inode]
        for d in documents
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_unchanged(document: Document) -> None:
    """Raise `InputError` if a document is no longer the file that was found."""
    now = _document(document.path, Path(document.name))
    if now != replace(document, sha256=None):
        raise InputError(f"text {document.path} was changed while it was read; start again")


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about a million characters that end with a line.

    Line ends are kept as they are, so the pieces' bytes are the file's (but for a byte-order mark).

    Raises:
        InputError: naming file and byte, where the text is not UTF-8.
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
    # A file reached twice, as itself and through its folder, must not be trained and evaluated on.
    once = {d.path.resolve(): d for d in reversed(kept)}
    return sorted(once.values(), key=lambda d: (d.name, str(d.path)))


def _wrong_encoding(path: Path) -> str:
    """Say where `path` stops being UTF-8; read again, since a text reader forgets its position."""
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
