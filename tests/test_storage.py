"""A folder has one writer, drafts do not stay, and a disk that refuses is one line that names the file."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gka import storage
from gka.errors import InputError, StorageError
from gka.storage import (
    DRAFT,
    LOCK,
    clear_drafts,
    draft_file,
    draft_folder,
    is_empty,
    only_maker,
    only_writer,
    storage_errors,
)

HOLDER = """
import os, sys, time
from pathlib import Path
from gka.storage import only_writer, draft_folder
with only_writer(Path(sys.argv[1])), draft_folder(Path(sys.argv[2])) as draft:
    (draft / "tokens").write_bytes(b"x")
    read, write = os.pipe()
    if sys.argv[3] == "fork" and not os.fork():
        os.write(write, b".")
        time.sleep(60)  # a worker that outlives its parent
        os._exit(0)
    if sys.argv[3] == "fork":
        os.read(read, 1)  # it runs
    print(draft, flush=True)
    time.sleep(60)
"""


def hold(folder: Path, target: Path, how: str = "") -> tuple[subprocess.Popen[str], Path]:
    """A process that writes `folder` and a draft of `target`, and that draft."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(target), how]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def make_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        os.utime(each, (then, then))


@pytest.mark.parametrize("how", ["", "fork"])
def test_a_lock_ends_with_its_owner(tmp_path: Path, how: str) -> None:
    """A second writer is told process and host; after SIGKILL of the first the folder is free, whatever
    children live on, and its draft goes with the next one, but no sooner."""
    folder, target = tmp_path / "run", tmp_path / "corpus"
    child, draft = hold(folder, target, how)
    try:
        who = rf"process {child.pid} on host {socket.gethostname()} since \d{{4}}-.*; wait until"
        told = pytest.raises(InputError, match=f"output {folder} is being written by {who}")
        with told, only_writer(folder):
            pass
        make_old(draft, 3600)
        clear_drafts(tmp_path, "corpus")
        assert (draft / "tokens").exists()
        end(child)
        with only_writer(folder):
            assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        with draft_folder(target):
            assert not draft.exists()
    finally:
        end(child)
        if how:
            os.killpg(child.pid, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and is_empty(folder)


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    """Afterwards the lock is gone, and so is a folder that was made for it and is still empty; what lies in a
    folder stays, and while it is locked it counts as empty."""
    with only_writer(tmp_path / "a" / "new"):
        assert is_empty(tmp_path / "a" / "new")
    assert not (tmp_path / "a" / "new").exists()
    (tmp_path / "old").mkdir()
    with only_writer(tmp_path / "old"):
        (tmp_path / "old" / "result").touch()
        assert not is_empty(tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["result"]


def test_a_folder_that_appears_at_once_is_locked_beside_it(tmp_path: Path) -> None:
    """`only_maker` keeps others out of a folder that is not there yet, and does not make it."""
    with only_maker(tmp_path / "model"):
        assert not (tmp_path / "model").exists()
        told = pytest.raises(InputError, match=f"being written by process {os.getpid()} on host")
        with told, only_maker(tmp_path / "model"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A link planted under the lock's name is refused, and what it points to is as it was."""
    (tmp_path / "treasure").write_text("gold")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "treasure")
    with pytest.raises(StorageError), only_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "treasure").read_text() == "gold"


@pytest.mark.parametrize("missing", ["module", "filesystem"])
def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Where the system or the file system has no locks, commands go on and say so; no drafts are cleared."""

    class Without:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_: Any) -> None:
            raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(storage, "fcntl", None if missing == "module" else Without)
    draft = tmp_path / f".corpus.abcdefgh{DRAFT}"
    draft.mkdir()
    make_old(draft, 3600)
    told = pytest.warns(RuntimeWarning, match=r"run is not locked, as this system or file system")
    with told, only_writer(tmp_path / "run"):
        pass
    with draft_folder(tmp_path / "corpus"):
        pass
    assert draft.exists()


def test_only_what_is_surely_a_left_over_goes(tmp_path: Path) -> None:
    """Young drafts, other targets' drafts, other names and links stay; an old draft of the target goes."""
    stay = [f"{name}{DRAFT}" for name in (".b.abcdefgh", "a.abcdefgh", ".a.abcdefghi")]
    stay += [".a.original", ".a.x"]
    for name in (*stay, f".a.12345678{DRAFT}"):
        (tmp_path / name).write_bytes(b"")
        make_old(tmp_path / name, 3600)
    (tmp_path / f".a.linklink{DRAFT}").symlink_to(tmp_path / ".a.x")
    (tmp_path / f".a.youngone{DRAFT}").write_bytes(b"")
    with draft_file(tmp_path / "a"):
        pass
    expected = {*stay, f".a.linklink{DRAFT}", f".a.youngone{DRAFT}"}
    assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (type("SafetensorError", (Exception,), {})("I/O error: (os error 28)"), "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos"), "half-way"),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_every_writer_of_files_is_understood(error: Exception, reason: str) -> None:
    """A full disk under Python, safetensors and torch is one error, with the name, the reason and what to do;
    it is an InputError and an OSError. Other errors pass."""
    with pytest.raises(StorageError) as caught, storage_errors("model x", advice="free space"):
        raise error
    assert str(caught.value).startswith("model x cannot be written: ")
    assert reason in str(caught.value) and str(caught.value).endswith("; free space")
    assert isinstance(caught.value, InputError) and isinstance(caught.value, OSError)
    with pytest.raises(ZeroDivisionError), storage_errors("model x"):
        raise ZeroDivisionError


def test_json_round_trip(tmp_path: Path) -> None:
    """What is written is read back, and no temporary file stays beside it."""
    path = tmp_path / "new" / "value.json"
    storage.write_json(path, {"a": [1, 2.5, None]})
    assert storage.read_json(path) == {"a": [1, 2.5, None]}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_text_is_stored_as_it_is(tmp_path: Path) -> None:
    """Text is UTF-8 with its line ends untouched, in a folder that is made for it, in place of what was."""
    path = tmp_path / "new" / "page.md"
    storage.write_text(path, "old")
    storage.write_text(path, "é\r\n\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n\n"
    assert [p.name for p in path.parent.iterdir()] == ["page.md"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails before the end leaves the former content and no debris."""
    path = tmp_path / "value.json"
    storage.write_json(path, {"old": 1})

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("content", ['{"a": 1', "[1]", "\xff"])
def test_damaged_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    """JSON that is cut short, no object, or no text is an error that names the file."""
    path = tmp_path / "value.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"value\.json"):
        storage.read_json(path)


def test_missing_json_is_refused_by_name(tmp_path: Path) -> None:
    """A missing file is an InputError too, not a bare FileNotFoundError."""
    with pytest.raises(InputError, match=r"none\.json does not exist"):
        storage.read_json(tmp_path / "none.json")
