"""`gka prime`: options to settings, errors to exit codes. Heavy imports come last."""

import os
from pathlib import Path
from typing import Any

import typer

from gka.commandline import text_console
from gka.errors import InputError
from gka.training.command import (
    INTERRUPTED,
    Tables,
    assigned_tables,
    given_tables,
    silence_libraries,
)
from gka.training.config import merged, read_recipe
from gka.training.options import Overwrite
from gka.training.priming import options as opt
from gka.training.priming.config import PrimeConfig


def prime(
    teacher: opt.Teacher = None,
    *,
    layers: opt.Layers = None,
    count: opt.Count = None,
    mixer: opt.Mixer = None,
    data: opt.Data = None,
    chat: opt.Chat = None,
    glob: opt.Glob = None,
    tokenizer: opt.Tokenizer = None,
    sequence_length: opt.SequenceLength = None,
    stage1_steps: opt.Stage1Steps = None,
    stage1_tokens: opt.Stage1Tokens = None,
    stage1_learning_rate: opt.Stage1LearningRate = None,
    end_weight: opt.EndWeight = None,
    stage2_steps: opt.Stage2Steps = None,
    stage2_tokens: opt.Stage2Tokens = None,
    stage2_learning_rate: opt.Stage2LearningRate = None,
    kl_weight: opt.KlWeight = None,
    lora_rank: opt.LoraRank = None,
    batch_size: opt.BatchSize = None,
    precision: opt.Precision = None,
    seed: opt.Seed = None,
    output: opt.Output = None,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
    resume: opt.Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a pretrained Transformer into a hybrid with recurrent layers, and train it back.

    Attention layers become GKA or Gated DeltaNet layers that begin from the attention's weights. Stage 1
    trains these alone, to give the hidden states that the attention gave; stage 2 trains everything on the
    text or conversations. Ctrl-C saves a checkpoint and stops; --resume goes on to exactly the same result.
    """
    both = {"batch_size": batch_size, "precision": precision, "seed": seed}
    one = {"max_steps": stage1_steps, "learning_rate": stage1_learning_rate}
    two = {"max_steps": stage2_steps, "learning_rate": stage2_learning_rate}
    tables = {
        "prime": {"teacher": teacher, "layers": layers, "count": count, "mixer": mixer},
        "data": {"text": data or None, "chat": chat or None, "glob": glob, "tokenizer": tokenizer},
        "stage1": both | one | {"end_weight": end_weight},
        "stage2": both | two | {"kl_weight": kl_weight, "lora_rank": lora_rank},
    }
    tables["data"]["sequence_length"] = sequence_length
    given = merged(
        read_recipe(recipe, "prime") if recipe else {},
        given_tables(tables),
        assigned_tables(settings or []),
    )
    tokens = {"stage1": stage1_tokens, "stage2": stage2_tokens}
    _run(_with_tokens(given, tokens), output, resume=resume, overwrite=overwrite)


def _with_tokens(given: Tables, tokens: dict[str, int | None]) -> Tables:
    """The tables with steps for each stage whose tokens were given."""
    for stage, count in tokens.items():
        if count is None:
            continue
        if count < 1:
            raise InputError(f"--{stage}-tokens is {count}; expected 1 or more")
        if "max_steps" in given.get(stage, {}):
            raise InputError(
                f"--{stage}-tokens and {stage}.max_steps exclude each other; give one of them"
            )
        config = PrimeConfig.from_tables(given)
        settings: Any = getattr(config, stage)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        step = settings.batch_size * settings.gradient_accumulation * processes
        step *= config.data.sequence_length
        given = merged(given, {stage: {"max_steps": -(-count // step)}})
    return given


def _run(given: Tables, output: Path | None, *, resume: bool, overwrite: bool) -> None:
    from gka.training import folder as files
    from gka.training.loop import Interrupted
    from gka.training.priming import report, run

    config = PrimeConfig.from_tables(given)
    folder = output or Path("runs") / f"prime-{config.prime.mixer}"
    silence_libraries()
    console = text_console(quiet=not files.is_main_process())
    if resume and config.prime.teacher and not (folder / files.RUN).exists():
        # A whole command can be repeated until its run is complete, by make or by a job queue.
        console.print(f"no run in {folder} yet: starting one", highlight=False, soft_wrap=True)
        resume = False
    if resume:
        config = files.resumed_config(folder, given, PrimeConfig)
    if not config.prime.teacher:
        raise InputError(
            "no teacher: give the folder of a saved model, as in gka prime runs/train-attention"
        )
    try:
        metrics = run.prime(config, folder, console=console, resume=resume, overwrite=overwrite)
    except Interrupted as stop:
        console.print(
            f"Stopped after step {stop.step} of a stage; the checkpoint is saved.\n"
            f"Resume: gka prime --resume --output {folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED + stop.signal) from None
    console.print(files.drawn(report.table, metrics, folder))
    places = {"model": files.MODEL, "figures": files.METRICS, "report": files.REPORT}
    for what, name in places.items():
        console.print(f"{what + ':':8} {folder / name}", highlight=False, soft_wrap=True)
