"""Machine code of the CUDA C++ kernels on disk, so that a later process does not compile it again.

A file holds the format, its key, the SHA-256 of the machine code, and the machine code. The key is a hash of
everything that the code depends on, so files never become stale, only unused. They lie in `compiled_folder()`
/ "cubins". The least recently used are removed when all together exceed `LIMIT`.
"""

import contextlib
import hashlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from gka.caches import compiled_folder
from gka.errors import StorageError
from gka.storage import write_bytes

FORMAT = b"gka cubin 1\n"
SUFFIX = ".cubin"
LIMIT = 256 * 2**20
"""Most bytes of all files together."""
COUNTS: Counter[str] = Counter()
"""Numbers of kernels that this process "compiled" and "read" from the folder."""
# Kernels compile in threads, and reading the umask changes it for all of them.
_WRITING = threading.Lock()
_warned: set[str] = set()


def kept(parts: Iterable[str], make: Callable[[], bytes]) -> bytes:
    """The result of `make()`, read from disk if an earlier call with the same parts kept it.

    Args:
        parts: everything that the result depends on; not evaluated if the cache is off.
        make: compiles; its exceptions propagate.

    Warns:
        RuntimeWarning: a file is damaged or foreign, and its kernel is compiled again; or the folder cannot
            be written, and nothing is kept.
    """
    folder = compiled_folder()
    if folder is None:
        return _made(make)
    key = key_of(parts)
    path = folder / "cubins" / f"{key.hex()}{SUFFIX}"
    found = _read(path, key)
    if found is not None:
        COUNTS["read"] += 1
        return found
    made = _made(make)
    _write(path, FORMAT + key + hashlib.sha256(made).digest() + made)
    return made


def _made(make: Callable[[], bytes]) -> bytes:
    COUNTS["compiled"] += 1
    return make()


def key_of(parts: Iterable[str]) -> bytes:
    """SHA-256 of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def _read(path: Path, key: bytes) -> bytes | None:
    """The machine code in a whole file of that key; None if there is none."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"{path} cannot be read ({error.strerror}): its kernel is compiled again")
        return None
    head = FORMAT + key
    sealed, content = stored[len(head) : len(head) + 32], stored[len(head) + 32 :]
    whole = stored.startswith(head) and content and hashlib.sha256(content).digest() == sealed
    if not whole:
        _warn(f"{path} is damaged or no file of this library: its kernel is compiled again")
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(path)  # for `_trim`
    return content


def _write(path: Path, content: bytes) -> None:
    with _WRITING:
        try:
            write_bytes(path, content)
            _trim(path.parent)
        except StorageError as error:
            _warn(
                f"compiled kernels are not kept: {error}. Every process compiles them again. Set GKA_CACHE "
                "to another folder, or GKA_COMPILE_CACHE=0 to keep none",
                once=str(path.parent),
            )


def _trim(folder: Path) -> None:
    """Remove the least recently used files until all together have at most `LIMIT` bytes."""
    with contextlib.suppress(OSError):  # another process may remove the same files
        files = [(p.stat(), p) for p in folder.glob(f"*{SUFFIX}")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
            if total <= LIMIT:
                return
            path.unlink()
            total -= stat.st_size


def _warn(text: str, once: str = "") -> None:
    """Warn, but only the first time for each `once`, or for each text if it is empty."""
    if (once or text) not in _warned:
        _warned.add(once or text)
        warnings.warn(text, RuntimeWarning, stacklevel=4)
