"""`gka evaluate`: long-context tasks on saved models; `gka lm-eval`: lm-evaluation-harness with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gka.commands import options as opt
from gka.commands.options import counting
from gka.console import text_console
from gka.errors import InputError
from gka.storage import only_writer

if TYPE_CHECKING:
    from rich.console import Console

    from gka.evaluation.context.run import Grid, Machine, Subject


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Folders of runs or of saved models.")],
    *,
    tasks: Annotated[
        str,
        typer.Option(help="Names separated by commas (see above), or all.", metavar="NAME,NAME"),
    ] = "needle, needle-keys, variables, questions, facts-1, perplexity",
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, from 256 on.", metavar="N,N")
    ] = "4096",
    depths: Annotated[
        str,
        typer.Option(help="Places of what is asked for: 0 first, 1 last.", metavar="X,X"),
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Prompts for each task, length and depth.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    text: opt.Text = None,
    glob: Annotated[str, typer.Option(help='Files to take from folders, as in "*.py".')] = "*",
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    chunk: opt.Chunk = 2048,
    output: Annotated[Path, opt.output_folder("Folder for evaluate.json and pictures.")] = Path(
        "runs/evaluate"
    ),
) -> None:
    """Evaluate causal language models on long prompts made of local text: needles, facts, words, perplexity.

    MODELS can be folders of any Hugging Face causal language models. Finished cells are kept in
    OUTPUT/evaluate.json: repeat the same command to continue after an interruption.

    Tasks: needle, needle-keys, needle-only, needle-values, needle-queries, variables, common-words,
    frequent-words, questions, facts-1 to facts-5, perplexity.
    """
    from gka.data.text import find_documents
    from gka.evaluation.context.run import Grid, Machine, Subject
    from gka.evaluation.context.tasks import NAMES

    wanted = NAMES if tasks == "all" else opt.names(tasks)
    places = opt.numbers("--lengths", lengths, int), opt.numbers("--depths", depths, float)
    grid = Grid(wanted, *places, samples, seed)
    opt.known_dtype(dtype)
    opt.at_least_one("--chunk", chunk)
    if len(set(models)) != len(models):
        raise InputError("models: the same folder is given twice")
    device = opt.usable_device(device)
    opt.silence_libraries()
    documents = find_documents(text or [], glob)
    subjects = [Subject.open(folder, documents) for folder in models]
    with only_writer(output, "--output"):
        _run(grid, subjects, output, Machine(device, dtype, chunk))


def _run(grid: "Grid", subjects: "list[Subject]", folder: Path, machine: "Machine") -> None:
    from gka.evaluation.context.run import run_grid
    from gka.evaluation.context.show import tables

    console, file = text_console(), folder / "evaluate.json"
    with counting(console, "cells", len(grid.cells()) * len(subjects), file) as done:
        content = run_grid(grid, subjects, file, machine, lambda record: done(_told(record)))
    for table in tables(content["asked"]):
        console.print(table)
    console.print(f"figures: {file}", highlight=False, soft_wrap=True)
    _draw(console, content["asked"], folder)


def _draw(console: "Console", records: list[dict[str, Any]], folder: Path) -> None:
    """Draw one plot per model, named after its folder."""
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
    """A finished cell as one line."""
    cell, result = record["cell"], record["result"]
    where = "" if cell["depth"] is None else f" at {cell['depth']:g}"
    if "bits_per_byte" in result:
        found = f"{result['bits_per_byte']:.3f} bits a byte"
    else:
        found = f"{result['rank']:.2f} / {result['match']:.2f}"
    return f"{found}  {cell['model']} {cell['task']} {cell['length']}{where} ({result['seconds']:.1f} s)"


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with this library's models: `--model gka --model_args pretrained=DIR`.

    All arguments, --help included, are lm_eval's.
    """
    from gka.evaluation.harness import main

    main(context.args)
