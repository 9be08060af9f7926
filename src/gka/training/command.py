"""`gka train`: options to settings, errors to exit codes. Heavy imports come last."""

import contextlib
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from gka.commandline import text_console
from gka.errors import InputError
from gka.training import options as opt
from gka.training.config import RunConfig, merged, read_recipe

Tables = dict[str, dict[str, Any]]
INTERRUPTED = 128  # the shell's convention: 128 + the signal's number


def train(
    text: opt.Text = None,
    *,
    output: opt.Output = None,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    glob: opt.Glob = None,
    tokenizer: opt.Tokenizer = None,
    sequence_length: opt.SequenceLength = None,
    mixer: opt.Mixer = None,
    attention_layers: opt.AttentionLayers = None,
    hidden_size: opt.HiddenSize = None,
    num_layers: opt.NumLayers = None,
    num_heads: opt.NumHeads = None,
    max_steps: opt.MaxSteps = None,
    batch_size: opt.BatchSize = None,
    learning_rate: opt.LearningRate = None,
    precision: opt.Precision = None,
    seed: opt.Seed = None,
) -> None:
    """Train a language model: text to tokens to a model, with checkpoints, figures and a plot.

    Ctrl-C saves a checkpoint and stops; --resume goes on from there to exactly the same result.
    """
    layers = _numbers("attention_layers", attention_layers)
    data = {"text": text or None, "glob": glob, "tokenizer": tokenizer}
    data |= {"sequence_length": sequence_length}
    model = {"mixer": mixer, "attention_layers": layers, "hidden_size": hidden_size}
    model |= {"num_hidden_layers": num_layers, "num_heads": num_heads}
    training = {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    training |= {"precision": precision, "seed": seed}
    options = given_tables({"data": data, "model": model, "training": training})
    given = merged(read_recipe(recipe) if recipe else {}, options, assigned_tables(settings or []))
    config = RunConfig.from_tables(given)
    folder = output or _default_output(recipe, config)
    _run(config, folder, given, resume=resume, overwrite=overwrite)


def _run(config: RunConfig, folder: Path, given: Tables, *, resume: bool, overwrite: bool) -> None:
    from gka.training import folder as files
    from gka.training import report, run

    silence_libraries()
    console = text_console(quiet=not files.is_main_process())
    if resume and any(given.values()) and not (folder / files.RUN).exists():
        # A whole command can be repeated until its run is complete, by make or by a job queue.
        console.print(f"no run in {folder} yet: starting one", highlight=False, soft_wrap=True)
        resume = False
    if resume:
        config = files.resumed_config(folder, given, RunConfig)
    try:
        metrics = run.train(config, folder, console=console, resume=resume, overwrite=overwrite)
    except run.Interrupted as stop:
        console.print(
            f"Stopped after step {stop.step} of {config.training.max_steps}; the checkpoint is saved.\n"
            f"Resume: gka train --resume --output {folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED + stop.signal) from None
    console.print(files.drawn(report.table, metrics, folder))
    for what, name in {"model": files.MODEL, "figures": files.METRICS, "plot": files.PLOT}.items():
        console.print(f"{what + ':':8} {folder / name}", highlight=False, soft_wrap=True)


def given_tables(options: Tables) -> Tables:
    """The tables without what was not given."""
    return {
        table: {key: value for key, value in values.items() if value is not None}
        for table, values in options.items()
    }


def assigned_tables(settings: Iterable[str]) -> Tables:
    """Tables from "table.key=value"; a value is read as TOML, or as text where it is not TOML."""
    tables: Tables = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise InputError(
                f"--set {setting!r}: expected TABLE.KEY=VALUE, as in model.num_iter=15"
            )
        parsed: Any = value.strip()
        with contextlib.suppress(tomllib.TOMLDecodeError):
            parsed = tomllib.loads(f"value = {value}")["value"]
        tables.setdefault(table, {})[key] = parsed
    return tables


def _numbers(name: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected numbers and commas, as in 1,3") from None


def _default_output(recipe: str | None, config: RunConfig) -> Path:
    name = Path(recipe).stem if recipe else "train"
    return Path("runs") / f"{name}-{config.model.get('mixer', 'mixers')}"


def silence_libraries() -> None:
    """Transformers' own bars and warnings would break into the commands' output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
