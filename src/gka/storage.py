"""What is written to disk: files that are whole or absent, one writer for a folder, drafts that do not stay.

Errors name the file. A lock is `flock` on an open file: the system releases it when its owner ends, however
it ends.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gka.errors import InputError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".gka.lock"
DRAFT = ".draft"
QUIET = 60.0
"""Seconds without a change before an unlocked draft counts as left over."""

_BUSY = (errno.EAGAIN, errno.EACCES)
_RANDOM = "[a-z0-9_]{8}"  # of tempfile's names
_held: set[int] = set()  # handles of locks; a forked child must not keep its parent's alive


@contextmanager
def only_writer(folder: Path, name: str = "output") -> Iterator[None]:
    """Be the only command that writes `folder` (made if it is missing) for the length of the block.

    A folder that was made here and is still empty afterwards is removed again.

    Args:
        folder: what is written.
        name: how messages call it.

    Raises:
        InputError: another process writes it; its id and host are named.
        StorageError: the folder or the lock in it cannot be made.

    Warns:
        RuntimeWarning: the system or the file system has no locks, so nothing guards the folder.
    """
    what = f"{name} {folder}"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{what} is a file; give a folder")
    made = not folder.exists()
    with storage_errors(what, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK, what):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something, or is gone
                folder.rmdir()


@contextmanager
def only_maker(folder: Path, name: str = "output") -> Iterator[None]:
    """As `only_writer`, for a folder that appears at once when it is complete: the lock lies beside it."""
    what = f"{name} {folder}"
    with storage_errors(what, "made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}{LOCK}", what):
        yield


def is_empty(folder: Path) -> bool:
    """Whether nothing lies in a folder but a lock."""
    return all(path.name == LOCK for path in folder.iterdir())


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, to be filled and renamed; removed unless it was.

    Drafts of `target` that ended processes left behind are removed first.
    """
    clear_drafts(target.parent, re.escape(target.name))
    draft = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=DRAFT, dir=target.parent)
    handle = os.open(draft, os.O_RDONLY)
    _held.add(handle)
    try:
        _try_lock(handle)
        yield Path(draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _close(handle)


@contextmanager
def draft_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, to be written and renamed; removed unless it was.

    Drafts of `target` that ended processes left behind are removed first.
    """
    clear_drafts(target.parent, re.escape(target.name))
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=DRAFT, dir=target.parent)
    _held.add(handle)
    try:
        _try_lock(handle)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        _close(handle)


def clear_drafts(folder: Path, names: str, suffix: str = DRAFT, quiet: float = QUIET) -> None:
    """Remove drafts in `folder` whose writers have ended: this user's, unlocked, and unchanged for a while.

    Args:
        folder: where they lie.
        names: a regular expression for the names of what they were to become.
        suffix: how a draft's name ends.
        quiet: seconds since the last change that are long enough.
    """
    pattern = re.compile(rf"\.(?:{names})\.{_RANDOM}{re.escape(suffix)}")
    with contextlib.suppress(OSError):  # an unreadable folder is the caller's to report
        for entry in list(os.scandir(folder)):
            if pattern.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _clear(Path(entry.path), quiet)


@contextmanager
def storage_errors(what: object, verb: str = "written", advice: str = "") -> Iterator[None]:
    """Turn the errors of a disk (full, read-only, no permission) in the block into one that names `what`.

    Args:
        what: the file or folder.
        verb: what cannot be done with it.
        advice: the end of the message: what to do.

    Raises:
        StorageError: such an error; any other passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        tail = f"; {advice}" if advice else ""
        raise StorageError(f"{what} cannot be {verb}: {reason}{tail}") from error


def _disk_reason(error: Exception) -> str | None:
    """Why a disk refused; None for an error of another kind."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return os.strerror(int(found[1]))
    # torch.save tells neither file nor reason
    if isinstance(error, RuntimeError) and re.search(
        "inline_container|StreamWriter|iostream", text
    ):
        return "writing stopped half-way (is the disk full?)"
    return None


@contextmanager
def _locked(file: Path, what: str) -> Iterator[None]:
    with storage_errors(what):
        handle = _acquired(file, what)
    try:
        with storage_errors(what):
            _sign(handle)
        yield
    finally:
        with contextlib.suppress(OSError):  # still held: nobody else's is removed
            file.unlink(missing_ok=True)
        _close(handle)


def _acquired(file: Path, what: str) -> int:
    """A handle of `file` that is locked, or a warning that it is not."""
    # a link planted under this name must not be written through
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        handle = os.open(file, flags, 0o666)
        _held.add(handle)
        try:
            locked = _try_lock(handle)
            if locked is None:
                warnings.warn(
                    f"{what} is not locked, as this system or file system has no locks: see to it that no "
                    "other command writes it",
                    RuntimeWarning,
                    stacklevel=6,
                )
                return handle
            if not locked:
                raise InputError(
                    f"{what} is being written by {_owner(handle)}; wait until that ends, end it, or give "
                    "another folder"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(file)):
                    return handle
        except BaseException:
            _close(handle)
            raise
        _close(handle)  # the former owner removed it between opening and locking


def _try_lock(handle: int) -> bool | None:
    """Whether the lock was free and now is ours; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _sign(handle: int) -> None:
    """Say in the lock's file who holds it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(facts).encode(), 0)


def _owner(handle: int) -> str:
    try:
        facts = json.loads(os.pread(handle, 4096, 0))
        pid, host, since = int(facts["pid"]), str(facts["host"]), str(facts["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return f"process {pid} on host {host} since {since}"


def _clear(draft: Path, quiet: float) -> None:
    """Remove one draft, if it is certain that nobody writes it."""
    facts = draft.lstat()
    if draft.is_symlink() or facts.st_uid != os.geteuid():
        return
    inside = list(draft.rglob("*")) if draft.is_dir() else []
    changed = max(p.lstat().st_mtime for p in (draft, *inside))
    if time.time() - changed < quiet:
        return
    handle = os.open(draft, os.O_RDONLY)
    try:
        if _try_lock(handle):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    finally:
        os.close(handle)


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _forget_in_child() -> None:
    for handle in list(_held):
        with contextlib.suppress(OSError):
            _close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


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
            os.chmod(draft, 0o666 & ~umask())
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


def umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
