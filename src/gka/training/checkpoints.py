"""Checkpoints: sealed once all their files are on disk, and verified before they are loaded."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import TrainerState

from gka.errors import InputError, reason_of
from gka.parallel.job import Job
from gka.parallel.state import METADATA, is_sharded_checkpoint
from gka.storage import read_json, sha256_of, storage_errors, write_json
from gka.training.folder import flush, is_main_process

SEAL = "complete.json"
UNFINISHED = ".unfinished"
"""File of a sharded checkpoint that is being written. With it and no seal, the next start deletes it."""
_NAME = re.compile(r"checkpoint-(\d+)")
_SHARD = re.compile(r"__(\d+)_\d+\.distcp")
_ASIDE = re.compile(r"damaged-checkpoint-(\d+)(-\d+)?")
# If one of these is missing, the Trainer silently continues from another state.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_NEEDED_SHARDED = ("trainer_state.json", METADATA, "groups.pt", "scheduler.pt")
_WEIGHTS = (".safetensors", ".bin")
_SHARDS = (".distcp",)
Files = dict[str, dict[str, Any]]


def sealed(folder: Path, rank: int = 0, ranks: int = 1) -> Files:
    """Write files of a checkpoint through to disk; their sizes and SHA-256 by name.

    Files are dealt to the ranks, each of which reads its own: the ones that it has written, mostly.
    """
    files = {}
    paths = sorted(path for path in folder.iterdir() if path.name not in (SEAL, UNFINISHED))
    for number, path in enumerate(paths):
        if _writer(path, number) % ranks == rank:
            flush(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    return files


def _writer(path: Path, number: int) -> int:
    """The rank that wrote a shard, by its name; `number` for another file."""
    found = _SHARD.fullmatch(path.name)
    return int(found[1]) if found else number


def seal(folder: Path, parts: Sequence[Files] | None = None) -> None:
    """Record the sizes and SHA-256 of all files of a checkpoint in `SEAL`.

    A checkpoint without a seal was cut short while it was written.

    Args:
        folder: the checkpoint.
        parts: every rank's result of `sealed`. None: this process's of all files.
    """
    files: Files = {}
    for part in [sealed(folder)] if parts is None else parts:
        files |= part
    write_json(folder / SEAL, dict(sorted(files.items())))


def seal_together(folder: Path, job: Job) -> None:
    """Seal a checkpoint that every rank has written to; each reads its own files.

    Raises:
        SharedError: a file cannot be read, or the seal not be written; the message names the folder.
    """
    job.wait()  # until every process has written its files
    with job.together(), storage_errors(f"checkpoint {folder}"):
        mine = sealed(folder, job.rank, job.ranks)
    parts = job.gather(mine)
    with job.together():
        if job.is_main:
            with storage_errors(f"checkpoint {folder}"):
                seal(folder, parts)
                (folder / UNFINISHED).unlink(missing_ok=True)
            clear_cut_short(folder.parent, int(folder.name.rpartition("-")[2]))


def fault(folder: Path) -> str | None:
    """The fault of a checkpoint in words, or None if it is as it was sealed."""
    if not (folder / SEAL).is_file():
        return "it was cut short while being written"
    try:
        files = read_json(folder / SEAL)
        what = _fault_of_seal(folder, files)
        for name, expected in files.items():
            what = what or _fault_of_file(folder / name, expected)
    except (InputError, KeyError, TypeError) as error:
        return f"{SEAL} is damaged ({error})"
    return what


def _fault_of_seal(folder: Path, files: dict[str, Any]) -> str | None:
    """The fault of a seal's list of files: one missing in it, one not listed, or one outside the folder."""
    sharded = METADATA in files
    needed, weights = (_NEEDED_SHARDED, _SHARDS) if sharded else (_NEEDED, _WEIGHTS)
    missing = [name for name in needed if name not in files]
    if not any(name.startswith("rng_state") for name in files):
        missing.append("rng_state.pth")
    if not any(name.endswith(weights) and "training_args" not in name for name in files):
        missing.append("weights")
    if missing:
        return f"{SEAL} does not name {', '.join(missing)}"
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if extra := sorted(there - {SEAL, *files}):
        return f"{extra[0]} is not among what was sealed"
    if strange := [name for name in files if Path(name).name != name]:
        return f"{SEAL} names {strange[0]!r}, which is no file of a checkpoint"
    return None


def _fault_of_file(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{path.name} has {path.stat().st_size} bytes, sealed with {expected['size']}"
    if sha256_of(path) != expected["sha256"]:
        return f"the content of {path.name} has changed since it was sealed"
    return None


def clear_cut_short(folder: Path, step: int) -> None:
    """Delete unsealed checkpoints that were set aside, up to `step`, if the one of `step` is sealed.

    An interrupted save left them, and the run has reached their steps again. Sealed ones are kept for
    inspection, as they were whole once.
    """
    if not (folder / f"checkpoint-{step}" / SEAL).is_file():
        return
    for path in folder.iterdir():
        found = _ASIDE.fullmatch(path.name)
        if found is None or int(found[1]) > step or path.is_symlink():
            continue
        if path.is_dir() and not (path / SEAL).exists():
            shutil.rmtree(path, ignore_errors=True)


def state_of(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Raises:
        InputError: it is unreadable, or its step is not the checkpoint's.
    """
    with loading(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        history: object = state.log_history
        rows = history if isinstance(history, list) else [None]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("log_history in trainer_state.json is no list of tables")
        if f"checkpoint-{state.global_step}" != checkpoint.name:
            raise ValueError(f"trainer_state.json is of step {state.global_step!r}")
    return state


@contextmanager
def loading(checkpoint: str | Path | None) -> Iterator[None]:
    """Name the checkpoint in every error while it is loaded.

    Raises:
        InputError: a file of it is unreadable, does not fit the run, or holds objects of foreign classes.
    """
    try:
        yield
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"{checkpoint} cannot be loaded: one of its files holds objects that no checkpoint has; none of "
            "their code was run. Move it away and resume from the one before"
        ) from error
    except Exception as error:  # each reader has exceptions of its own
        raise InputError(
            f"{checkpoint} cannot be loaded: {reason_of(error)}; it does not fit this run's settings, or was "
            "altered. Move it away and resume from the one before"
        ) from error


def has_sharded(folder: Path) -> bool:
    """Whether a folder has a checkpoint that several ranks have written."""
    return any(is_sharded_checkpoint(path) for path in folder.glob("checkpoint-*"))


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; None if there is none.

    Newer, damaged ones are not loaded: the main process renames them to `damaged-checkpoint-N` and says so
    through `say`. After a later save `clear_cut_short` deletes the unsealed ones. Those whose writing is
    known not to have ended (`UNFINISHED`) are deleted.
    """
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if (path / UNFINISHED).exists() and not (path / SEAL).exists():
            if is_main_process():
                shutil.rmtree(path, ignore_errors=True)
                say(f"{path} was being written when the run ended; deleted")
            continue
        if (what := fault(path)) is None:
            return path
        if is_main_process():
            say(f"{path} is not loaded: {what}; set aside as {_set_aside(path).name}")
    return None


def _set_aside(path: Path) -> Path:
    name, number = f"damaged-{path.name}", 1
    while (target := path.with_name(name)).exists():
        number += 1
        name = f"damaged-{path.name}-{number}"
    return path.rename(target)
