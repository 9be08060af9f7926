"""`gka train`: a new or resumed training run."""

from pathlib import Path
from typing import Annotated

from gka.commands import runs
from gka.commands.options import tell
from gka.training.config import (
    CorpusConfig,
    ModelSettings,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from gka.training.recipes import read_recipe, recipe_names
from gka.training.settings import Tables, merged

Output = Annotated[Path | None, runs.run_folder("runs/RECIPE-MIXER")]
Recipe = Annotated[str | None, runs.named_recipe(recipe_names("train"), "cpu")]
Settings = Annotated[
    list[str] | None, runs.any_setting("model.num_iter=15 or training.save_steps=50")
]


@runs.with_settings(
    {
        "data": CorpusConfig,
        "model": ModelSettings,
        "training": TrainingConfig,
        "parallel": ParallelConfig,
    },
    argument="text",
)
def train(
    given: Tables,
    *,
    output: Output = None,
    recipe: Recipe = None,
    settings: Settings = None,
    resume: runs.Resume = False,
    overwrite: runs.Overwrite = False,
) -> None:
    """Train a language model on text, with checkpoints, figures and a plot.

    Ctrl-C saves a checkpoint and stops; --resume continues to exactly the same result.
    """
    base = read_recipe(recipe) if recipe else {}
    given = merged(base, given, runs.assigned(settings or []))
    config = RunConfig.from_tables(given)
    folder = output or _default_output(recipe, config)

    from gka.parallel import joined
    from gka.training import folder as files
    from gka.training import run

    console = runs.console()
    with joined() as job:
        resume = job.gather(runs.resumes(folder, console, resume, may_start=any(given.values())))[0]
        if resume:
            with job.together():
                config = files.resumed_config(folder, given, RunConfig)
        with runs.stopped("train", folder, console, f"of {config.training.max_steps}"):
            metrics = run.train(config, folder, console=console, resume=resume, overwrite=overwrite)
    console.print(files.drawn(run.table, metrics, folder))
    tell(console, folder, model=files.MODEL, figures=files.METRICS, plot=files.PLOT)


def _default_output(recipe: str | None, config: RunConfig) -> Path:
    name = Path(recipe).stem if recipe else "train"
    return Path("runs") / f"{name}-{config.model.get('mixer', 'mixers')}"
