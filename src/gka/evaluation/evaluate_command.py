"""`gka evaluate` and `gka lm-eval`: options to settings, results to files. Heavy imports come last."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gka.commandline import counted, lines, text_console
from gka.errors import InputError
from gka.evaluation.command import _check_device, _numbers, _Stopped, _stopping_by_signal
from gka.storage import only_writer

if TYPE_CHECKING:
    from rich.console import Console

    from gka.evaluation.context.run import Grid, Machine, Subject


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Folders of runs or of saved models.")],
    *,
    tasks: Annotated[
        str, typer.Option(help="Names, or all; see the end of this help.")
    ] = "needle,needle-keys,variables,questions,facts-1,perplexity",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, from 256 on.")] = "4096",
    depths: Annotated[
        str, typer.Option(help="Where what is asked for stands: 0 first, 1 last.")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Prompts for each task, length and depth.")] = 5,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text file or folder; repeatable. [default: Python's standard library]"),
    ] = None,
    glob: Annotated[str, typer.Option(help="Files to read in folders.")] = "*",
    device: Annotated[str | None, typer.Option(help="[default: cuda where there is one]")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16.")] = "auto",
    chunk: Annotated[int, typer.Option(help="Tokens read at a time.")] = 2048,
    output: Annotated[Path, typer.Option(help="Folder for evaluate.json and pictures.")] = Path(
        "runs/evaluate"
    ),
) -> None:
    """Ask causal language models about long texts made of local text: needles, facts, words, perplexity.

    Any Hugging Face causal model's folder can be given beside those of this library. Finished cells are
    kept in OUTPUT/evaluate.json: run the same command again to go on after an interruption.

    Tasks: needle, needle-keys, needle-only, needle-values, needle-queries, variables, common-words,
    frequent-words, questions, facts-1 to facts-5, perplexity.
    """
    from gka.checkpoints.open import DTYPES
    from gka.data.corpus import find_documents
    from gka.evaluation.context.run import Grid, Machine, Subject
    from gka.evaluation.context.tasks import NAMES

    names = NAMES if tasks == "all" else tuple(name.strip() for name in tasks.split(","))
    grid = Grid(
        names,
        _numbers("--lengths", lengths, int),
        _numbers("--depths", depths, float),
        samples,
        seed,
    )
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if chunk < 1:
        raise InputError(f"--chunk is {chunk}; expected 1 or more")
    if len(set(models)) != len(models):
        raise InputError("models: the same folder is given twice")
    device = device or _best_device()
    _check_device(device)
    _silence_libraries()
    documents = find_documents(text or [], glob)
    subjects = [Subject.open(folder, documents) for folder in models]
    with only_writer(output, "--output"):
        _run(grid, subjects, output, Machine(device, dtype, chunk))


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with this library's models: `--model gka --model_args pretrained=DIR`.

    All arguments are lm_eval's own, and so is --help.
    """
    from gka.evaluation.harness import main

    main(context.args)


def _run(grid: "Grid", subjects: "list[Subject]", folder: Path, machine: "Machine") -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    from gka.evaluation.context.run import run_grid
    from gka.evaluation.context.show import tables

    console, file = text_console(), folder / "evaluate.json"
    columns = TextColumn("cells"), BarColumn(), MofNCompleteColumn(), Elapsed()
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=len(grid.cells()) * len(subjects))
    try:
        with _stopping_by_signal(), progress, lines(console, counted("cells", progress)):

            def show(record: dict[str, Any]) -> None:
                progress.console.print(_told(record), highlight=False, soft_wrap=True)
                progress.advance(bar)

            content = run_grid(grid, subjects, file, machine, show)
    except _Stopped as stopped:
        console.print(f"Stopped. Finished cells are kept in {file}.", soft_wrap=True)
        console.print("Run the same command again to go on.")
        raise typer.Exit(128 + stopped.signal) from None
    for table in tables(content["asked"]):
        console.print(table)
    console.print(f"figures: {file}", highlight=False, soft_wrap=True)
    _draw(console, content["asked"], folder)


def _draw(console: "Console", records: list[dict[str, Any]], folder: Path) -> None:
    """A picture for each model, named after its folder."""
    from gka.evaluation.context.show import by_model, plot

    names: list[str] = []
    for model, found in by_model(records).items():
        parts = [part for part in Path(model).resolve().parts if part != "model"]
        name = parts[-1] if parts else "model"
        names.append(name)
        count = names.count(name)
        path = folder / (f"{name}.png" if count == 1 else f"{name}-{count}.png")
        plot(path.stem, found, path)
        console.print(f"picture: {path}", highlight=False, soft_wrap=True)


def _told(record: dict[str, Any]) -> str:
    """A finished cell on one line."""
    cell, result = record["cell"], record["result"]
    where = "" if cell["depth"] is None else f" at {cell['depth']:g}"
    if "bits_per_byte" in result:
        found = f"{result['bits_per_byte']:.3f} bits a byte"
    else:
        found = f"{result['rank']:.2f} / {result['match']:.2f}"
    return f"{found}  {cell['model']} {cell['task']} {cell['length']}{where} ({result['seconds']:.1f} s)"


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _silence_libraries() -> None:
    """Transformers' own bars and warnings would break into the command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
