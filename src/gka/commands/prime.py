"""`gka prime`: a new or resumed priming run."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gka.commands import runs
from gka.commands.options import tell
from gka.errors import InputError
from gka.training.priming.config import KINDS, PrimeConfig
from gka.training.recipes import read_recipe, recipe_names
from gka.training.settings import Tables, merged

Output = Annotated[Path | None, runs.run_folder("runs/prime-MIXER")]
Recipe = Annotated[str | None, runs.named_recipe(recipe_names("prime"))]
Settings = Annotated[
    list[str] | None, runs.any_setting("mixer.num_iter=15 or stage1.save_steps=50")
]


def _tokens(stage: str) -> Any:
    help = "Instead of steps: tokens to read, rounded up to steps."
    return typer.Option(help=help, rich_help_panel=runs.PANELS[stage])


Stage1Tokens = Annotated[int | None, _tokens("stage1")]
Stage2Tokens = Annotated[int | None, _tokens("stage2")]


@runs.with_settings(KINDS, argument="teacher")
def prime(
    given: Tables,
    *,
    stage1_tokens: Stage1Tokens = None,
    stage2_tokens: Stage2Tokens = None,
    output: Output = None,
    recipe: Recipe = None,
    settings: Settings = None,
    resume: runs.Resume = False,
    overwrite: runs.Overwrite = False,
) -> None:
    """Convert a pretrained Transformer into a hybrid with recurrent layers, and train it.

    Attention layers become GKA or Gated DeltaNet layers, initialised from the attention's weights. Stage 1
    trains only these layers, to match the attention layers' hidden states. Stage 2 trains all weights on
    the text or conversations. Ctrl-C saves a checkpoint and stops; --resume continues to the same result.
    """
    base = read_recipe(recipe, "prime") if recipe else {}
    given = merged(base, given, runs.assigned(settings or []))
    given = _with_tokens(given, {"stage1": stage1_tokens, "stage2": stage2_tokens})
    config = PrimeConfig.from_tables(given)
    folder = output or Path("runs") / f"prime-{config.prime.mixer}"

    from gka.training import folder as files
    from gka.training.priming import report, run

    console = runs.console()
    resume = runs.resumes(folder, console, resume, may_start=bool(config.prime.teacher))
    if resume:
        config = files.resumed_config(folder, given, PrimeConfig)
    if not config.prime.teacher:
        raise InputError(
            "no teacher: give the folder of a saved model, as in gka prime runs/train-attention"
        )
    with runs.stopped("prime", folder, console, "of a stage"):
        metrics = run.prime(config, folder, console=console, resume=resume, overwrite=overwrite)
    console.print(files.drawn(report.table, metrics, folder))
    tell(console, folder, model=files.MODEL, figures=files.METRICS, report=files.REPORT)


def _with_tokens(given: Tables, tokens: dict[str, int | None]) -> Tables:
    """The tables with `max_steps` of each stage for which a number of tokens was given."""
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
