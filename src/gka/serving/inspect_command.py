"""`gka inspect`: options to calls. Heavy imports come last."""

from pathlib import Path
from typing import Annotated

import typer

from gka.commandline import text_console
from gka.errors import InputError
from gka.serving.command import (
    Model,
    NumIter,
    PrefillChunk,
    Prompt,
    RidgeRatio,
    SolverName,
    silence_libraries,
)
from gka.storage import only_writer


def inspect(
    model: Model,
    *,
    prompt: Prompt = None,
    file: Annotated[
        Path | None, typer.Option(help="A UTF-8 file with the text. [default: standard input]")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for inspection.html and inspection.json.")
    ] = Path("inspection"),
    positions: Annotated[
        int, typer.Option(help="Places of the text at which the states are looked at.")
    ] = 64,
    prefill_chunk: PrefillChunk = 4096,
    num_iter: NumIter = None,
    ridge_ratio: RidgeRatio = None,
    solver: SolverName = None,
) -> None:
    """Show what a model's memory does with a text: decay, ridge, solver error, by layer and head.

    The model needs a GKA layer. Writes a page that any browser opens and the figures as JSON, and prints
    a table.
    """
    from gka.data.files import write_json, write_text
    from gka.serving import inspection, inspection_page, sample
    from gka.serving.inspection_table import table

    text = sample.read_prompt(prompt, file, option="file")
    silence_libraries()
    loaded, tokenizer = sample.load(model)
    loaded.set_solver(num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    if not ids:
        raise InputError("the text is empty: give --prompt, --file or standard input")
    page, figures = output / "inspection.html", output / "inspection.json"
    with only_writer(output, "--output"):
        found = inspection.inspect_model(
            loaded,
            ids,
            positions=positions,
            chunk=prefill_chunk,
        )
        content = {"model_folder": str(model)} | found
        write_json(figures, content)
        write_text(page, inspection_page.page(content))
    console = text_console()
    console.print(table(content))
    for what, path in (("page", page), ("figures", figures)):
        console.print(f"{what + ':':8} {path}", highlight=False, soft_wrap=True)
