"""Writing to disk: files that are complete or absent, one writer per folder, drafts that are cleaned up.

Errors name the file. A lock is `flock` on an open file, which the system releases when the owner ends.
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

from gka.errors import BusyError, InputError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".gka.lock"
DRAFT = ".draft"
QUIET = 60.0
"""Seconds without a change after which an unlocked draft counts as abandoned."""

_BUSY = (errno.EAGAIN, errno.EACCES)
_RANDOM = "[a-z0-9_]{8}"  # the random part of tempfile's names
# Handles of locks; a forked child closes them, so that locks end with the parent.
_held: set[int] = set()


@contextmanager
def only_writer(folder: Path, name: str = "output") -> Iterator[None]:
    """Lock `folder` in the block, so that no other command writes to it. Creates it if it is missing.

    A folder that was created here and is still empty afterwards is removed.

    Args:
        folder: the folder.
        name: the folder's role, for messages.

    Raises:
        InputError: it is a file, or (BusyError) another process writes to it; the message names process
            and host.
        StorageError: the folder or its lock cannot be created.

    Warns:
        RuntimeWarning: the system or the file system has no locks, so the folder is not protected.
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
            with contextlib.suppress(OSError):  # it is not empty, or was removed
                folder.rmdir()


@contextmanager
def only_maker(folder: Path, name: str = "output") -> Iterator[None]:
    """As `only_writer` for a folder that appears only when complete; the lock file lies beside it."""
    what = f"{name} {folder}"
    with storage_errors(what, "made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}{LOCK}", what):
        yield


def is_empty(folder: Path) -> bool:
    """Whether a folder contains nothing but a lock."""
    return all(path.name == LOCK for path in folder.iterdir())


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, to be filled and renamed; removed at the end if it was not renamed.

    Abandoned drafts of `target` are removed first.
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
    """An empty file beside `target`, to be written and renamed; removed at the end if it was not renamed.

    Abandoned drafts of `target` are removed first.
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
    """Remove abandoned drafts in `folder`: owned by this user, unlocked, and unchanged for `quiet` seconds.

    Args:
        folder: the folder.
        names: a regular expression for the names of the drafts' targets.
        suffix: the end of a draft's name.
        quiet: seconds since the last change.
    """
    pattern = re.compile(rf"\.(?:{names})\.{_RANDOM}{re.escape(suffix)}")
    with contextlib.suppress(OSError):  # the caller reports an unreadable folder
        for entry in list(os.scandir(folder)):
            if pattern.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _clear(Path(entry.path), quiet)


@contextmanager
def storage_errors(what: object, verb: str = "written", advice: str = "") -> Iterator[None]:
    """Turn a disk error (full, read-only, no permission) in the block into one that names `what`.

    Args:
        what: the file or folder.
        verb: completes "cannot be ...".
        advice: what to do, the end of the message.

    Raises:
        StorageError: a disk error; other errors pass unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        tail = f"; {advice}" if advice else ""
        raise StorageError(f"{what} cannot be {verb}: {reason}{tail}") from error


def disk_reason(error: Exception) -> str | None:
    """The reason of a disk error in words; None for an error of another kind."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        return os.strerror(int(found[1]))
    # torch.save gives neither the file nor the reason.
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
        with contextlib.suppress(OSError):  # before the lock is released, so this is our own file
            file.unlink(missing_ok=True)
        _close(handle)


def _acquired(file: Path, what: str) -> int:
    """A locked handle of `file`; without locks, a handle and a warning."""
    # Do not write through a symbolic link that somebody placed under this name.
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
                raise BusyError(
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
    """Whether the lock was free and is now ours; None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _sign(handle: int) -> None:
    """Write the owner into the lock's file."""
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
    """Remove one draft if it is abandoned (see `clear_drafts`)."""
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
    """A temporary file beside `path`, which replaces `path` when the block ends without an error.

    A crash leaves the complete old or new file; an error leaves the old one.

    Raises:
        StorageError: `path` cannot be written, for example because the disk is full.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft_file(path) as draft:
            yield draft
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            # tempfile makes private files; the result gets the user's default permissions.
            os.chmod(draft, 0o666 & ~umask())
            os.replace(draft, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`; a crash leaves the complete old or new file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8 as `write_bytes`; line ends are kept."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON as `write_bytes`; NaN raises `ValueError`, because JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing, no valid JSON or not an object.
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
    """SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def umask() -> int:
    """The process's umask: permission bits that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
