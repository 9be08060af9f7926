"""The folder of a run: its files, and the checks before they are written.

run.json           settings, and checksums of the settings and of the run's inputs
checkpoints/       checkpoint-N, everything needed to continue from step N
model/             the trained model and its tokenizer, for from_pretrained and `gka generate`
metrics.json       metrics, loss curves, versions, hardware; exists once the run is complete
log.jsonl          losses, speed and health as the run goes (with training.tensorboard also tensorboard/)
loss.png           plot of the loss curves
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from gka.errors import InputError
from gka.parallel.job import current
from gka.storage import (
    draft_folder,
    is_empty,
    only_writer,
    read_json,
    storage_errors,
    write_json,
)
from gka.training.settings import merged

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RUN, CHECKPOINTS, MODEL, METRICS, PLOT = (
    "run.json",
    "checkpoints",
    "model",
    "metrics.json",
    "loss.png",
)
LOG, EVENTS = "log.jsonl", "tensorboard"
FORMAT = 1
# Settings of runs that began before these settings were there.
_BEFORE = {"data": {"column": "", "documents": "former", "eval_tokens": 0}}
RANKS, GLOBAL_BATCH = "ranks", "global_batch"  # keys of run.json
# Not in the settings' checksum: sources may move, as their content has its own checksums.
_PLACES = {"data": ("text", "chat"), "prime": ("teacher",)}
# Not in it either, and free to change when a run is resumed: any number of ranks computes the same.
_FREE = "parallel"
# Folders that `gka prime` adds: its two stages and its report.
STAGES, REPORT = ("stage1", "stage2"), "report"


class Settings(Protocol):
    """Configuration of a run, to tables and back: `RunConfig`, `PrimeConfig`."""

    def tables(self) -> dict[str, dict[str, Any]]: ...

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> Self: ...


AnySettings = TypeVar("AnySettings", bound=Settings)


@contextmanager
def open_output(
    output: Path, console: "Console", *, resume: bool, overwrite: bool
) -> Iterator[dict[str, Any] | None]:
    """Check and lock the folder that a run is to write.

    Args:
        output: the run's folder.
        console: told if the run to resume is complete.
        resume: continue the run in `output`.
        overwrite: allow a run in `output` to be replaced.

    Yields:
        The metrics if the run to resume is complete, else None.

    Raises:
        InputError: `output` cannot be used, or another process writes it; nothing has been changed.
    """
    job = current()
    with job.together():
        _check_output(output, resume, overwrite)
    if job.gather(resume and (output / METRICS).exists())[0]:
        console.print(f"The run in {output} is complete; there is nothing to resume.", markup=False)
        yield read_json(output / METRICS)
        return
    with ExitStack() as stack:
        with job.together():
            if is_main_process():
                stack.enter_context(only_writer(output))
                # another run may have ended before the lock
                _check_output(output, resume, overwrite)
        yield None


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Check that `output` is new or empty, or holds a run to resume or overwrite.

    Raises:
        InputError: it is not; nothing has been changed.
    """
    if not is_main_process():
        return  # the main process may already be writing
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other; give one of them")
    if resume:
        stored_tables(output)
    elif output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file; give a folder")
    elif output.is_dir() and not is_empty(output):
        if not (output / RUN).is_file():
            raise InputError(f"output {output} is not empty and holds no run; give another folder")
        if not overwrite:
            raise InputError(
                f"output {output} already holds a run; go on with --resume, replace it with "
                "--overwrite, or give another folder"
            )


def is_main_process() -> bool:
    """Whether this process writes files: rank 0 of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def stored_tables(output: Path) -> dict[str, dict[str, Any]]:
    """The settings of the run in `output`.

    Raises:
        InputError: there is no run, or `run.json` is damaged.
    """
    if not (output / RUN).is_file():
        raise InputError(f"output {output} holds no run to resume ({RUN} is missing)")
    run = read_json(output / RUN)
    if run.get("format") != FORMAT or not isinstance(run.get("config"), dict):
        raise InputError(f"{output / RUN} is not a run of this version (format {FORMAT})")
    return run["config"]


def resumed_config(
    output: Path, given: Mapping[str, Mapping[str, Any]], kind: type[AnySettings]
) -> AnySettings:
    """The stored settings of a run; settings given again must agree with them, but for [parallel].

    Raises:
        InputError: a setting differs (the first is named), run.json was edited, or the command is another.
    """
    tables = stored_tables(output)
    if set(tables) - {_FREE} != set(kind.from_tables({}).tables()) - {_FREE}:
        raise InputError(
            f"the run in {output} is of another command: its tables are {', '.join(tables)}"
        )
    config = _believed(output, kind, tables)
    stored = config.tables()
    asked = kind.from_tables(merged(stored, given))
    for table, values in asked.tables().items():
        if table == _FREE:
            continue
        for key, value in values.items():
            if key not in stored[table] or value != stored[table][key]:
                raise InputError(
                    f"{table}.{key} is {value!r}, but the run in {output} began with "
                    f"{stored[table].get(key)!r}; a resumed run keeps its settings"
                )
    return asked


def _believed(output: Path, kind: type[AnySettings], tables: dict[str, Any]) -> AnySettings:
    """The settings in run.json, checked for types, ranges and later edits."""
    try:
        config = kind.from_tables(_with_former_settings(tables, kind))
    except InputError as error:
        raise InputError(f"{output / RUN}: {error}") from None
    noted = read_json(output / RUN).get("config_sha256")
    if noted is not None and noted != _settings_checksum(tables):  # older runs have none
        raise InputError(
            f"{output / RUN}: its settings have changed since the run began (their checksum differs); "
            "restore them, or start a new run"
        )
    return config


def _with_former_settings(tables: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """The settings with what an earlier release did where they name no choice."""
    known = kind.from_tables({}).tables()
    former = {
        table: {key: value for key, value in values.items() if key in known.get(table, {})}
        for table, values in _BEFORE.items()
    }
    return merged(former, tables)


def _settings_checksum(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of the settings without the paths of sources."""
    kept = {
        table: {key: value for key, value in values.items() if key not in _PLACES.get(table, ())}
        for table, values in tables.items()
        if table != _FREE
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def global_batch(output: Path) -> int | None:
    """Blocks of each optimizer step of the run in `output`, over all ranks; None if run.json does not say."""
    found = read_json(output / RUN).get(GLOBAL_BATCH)
    return found if isinstance(found, int) and found > 0 else None


def drawn(
    draw: Callable[[dict[str, Any]], "Table"], metrics: dict[str, Any], output: Path
) -> "Table":
    """`draw(metrics)`, a table for a terminal.

    Raises:
        InputError: metrics.json, from which a complete run's metrics were read, lacks some of them.
    """
    try:
        return draw(metrics)
    except (KeyError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise InputError(
            f"{output / METRICS} does not hold the metrics of a complete run ({error!r}); move it away and "
            "resume, which writes it again"
        ) from None


def begin(
    config: Settings,
    output: Path,
    checksums: dict[str, str],
    *,
    resume: bool,
    overwrite: bool,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write run.json, or check that the inputs of a resumed run have not changed.

    Args:
        config: the settings.
        output: the run's folder.
        checksums: of the run's inputs, by name: "tokens_sha256", ...
        resume: check instead of writing.
        overwrite: delete the run in `output` first.
        facts: more to note about the run's begin.

    Raises:
        InputError: a checksum differs from the stored one.
    """
    if resume:
        stored = read_json(output / RUN)
        for name, value in checksums.items():
            if stored.get(name) != value:
                is_text = name in ("tokens_sha256", "corpus_sha256")
                what = "text" if is_text else name.removesuffix("_sha256")
                raise InputError(
                    f"{what} has changed since the run in {output} began (its checksum differs); "
                    "restore it, or start a new run"
                )
        return
    if not is_main_process():
        return
    if overwrite:
        _remove_run(output)
    tables = config.tables()
    content = {"format": FORMAT, "config": tables, "config_sha256": _settings_checksum(tables)}
    write_json(output / RUN, content | checksums | dict(facts or {}))


def _remove_run(output: Path) -> None:
    """Delete the files of a run and no others; run.json, which marks the folder as a run's, goes last."""
    for name in (CHECKPOINTS, MODEL, EVENTS, *STAGES, REPORT):
        if (output / name).exists():
            shutil.rmtree(output / name)
    for name in (METRICS, PLOT, LOG, RUN):
        (output / name).unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces `target` when the block ends without an error.

    `target` is the whole old folder or the whole new one at all times, or absent between two renames.
    """
    with draft_folder(target) as draft:
        fresh = draft / "new"
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            flush(path)
        if target.exists():
            target.rename(draft / "old")
        fresh.rename(target)


def flush(path: Path) -> None:
    """Write a file or folder through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer to `folder`, which is replaced once all of them are on the disk.

    Raises:
        StorageError: they cannot be written, on a full disk for example; `folder` is unchanged.
    """
    model.config.use_cache = True  # the Trainer turns it off; generation needs it
    advice = "the checkpoints are kept: free space, then go on with --resume"
    with storage_errors(f"model {folder}", advice=advice):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
