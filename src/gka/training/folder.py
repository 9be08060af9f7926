"""The folder of a run: what is where, and who may write there.

run.json           the settings, and the checksum of the tokens they gave
checkpoints/       checkpoint-N, everything needed to go on from step N
model/             the trained model and its tokenizer, for from_pretrained and `gka generate`
metrics.json       figures, loss curves, versions, hardware; there once the run is complete
loss.png           the curves
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.data import PackedTokens
from gka.data.files import read_json, write_json
from gka.errors import InputError
from gka.training.config import RunConfig, merged

if TYPE_CHECKING:
    from transformers import Trainer

RUN, CHECKPOINTS, MODEL, METRICS, PLOT = (
    "run.json",
    "checkpoints",
    "model",
    "metrics.json",
    "loss.png",
)
FORMAT = 1


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """A new run needs a new or empty folder, or leave to replace the run in it.

    Raises:
        InputError: if `output` may not be used; nothing has been changed.
    """
    if not is_main_process():
        return  # the main process may have begun to write already
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other; give one of them")
    if resume:
        stored_tables(output)
    elif output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file; give a folder")
    elif output.is_dir() and any(output.iterdir()):
        if not (output / RUN).is_file():
            raise InputError(f"output {output} is not empty and holds no run; give another folder")
        if not overwrite:
            raise InputError(
                f"output {output} already holds a run; go on with --resume, replace it with "
                "--overwrite, or give another folder"
            )
    try:
        output.mkdir(parents=True, exist_ok=True)  # better to fail now than after the training
    except OSError as error:
        raise InputError(f"output {output} cannot be made: {error.strerror}") from None


def is_main_process() -> bool:
    """Whether this process writes: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def stored_tables(output: Path) -> dict[str, dict[str, Any]]:
    """The settings of the run in `output`.

    Raises:
        InputError: if there is no run, or `run.json` is damaged.
    """
    if not (output / RUN).is_file():
        raise InputError(f"output {output} holds no run to resume ({RUN} is missing)")
    run = read_json(output / RUN)
    if run.get("format") != FORMAT or not isinstance(run.get("config"), dict):
        raise InputError(f"{output / RUN} is not a run of this version (format {FORMAT})")
    return run["config"]


def resumed_config(output: Path, given: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The stored settings of a run; what is given again must agree with them.

    Raises:
        InputError: naming the first setting that differs.
    """
    stored = stored_tables(output)
    asked = RunConfig.from_tables(merged(stored, given)).tables()
    for table, values in asked.items():
        for key, value in values.items():
            if key not in stored[table] or value != stored[table][key]:
                raise InputError(
                    f"{table}.{key} is {value!r}, but the run in {output} began with "
                    f"{stored[table].get(key)!r}; a resumed run keeps its settings"
                )
    return RunConfig.from_tables(stored)


def begin(
    config: RunConfig, output: Path, packed: PackedTokens, *, resume: bool, overwrite: bool
) -> None:
    """Note the run's settings, or check that its tokens are still those it began with."""
    if resume:
        began_with = read_json(output / RUN).get("tokens_sha256")
        if began_with != packed.checksum:
            raise InputError(
                f"text has changed since the run in {output} began (its tokens' checksum differs); "
                "restore it, or start a new run"
            )
        return
    if not is_main_process():
        return
    if overwrite:
        _remove_run(output)
    stored = {"format": FORMAT, "config": config.tables(), "tokens_sha256": packed.checksum}
    write_json(output / RUN, stored)


def _remove_run(output: Path) -> None:
    """Delete what a run writes, and nothing else that may lie beside it; its mark goes last."""
    for name in (CHECKPOINTS, MODEL):
        if (output / name).exists():
            shutil.rmtree(output / name)
    for name in (METRICS, PLOT, RUN):
        (output / name).unlink(missing_ok=True)


def save_model(trainer: "Trainer", folder: Path) -> None:
    """Save model and tokenizer beside `folder`, then put them there at once."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model: Any = trainer.model
    model.config.use_cache = True  # the Trainer turns it off; whoever loads the model wants it
    model.save_pretrained(fresh)
    trainer.processing_class.save_pretrained(fresh)  # type: ignore[union-attr]
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
