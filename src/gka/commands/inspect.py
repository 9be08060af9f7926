"""`gka inspect`: measurements of a saved model's memory on a text, as a page, figures and a table."""

from pathlib import Path
from typing import Annotated

import typer

from gka.commands import options as opt
from gka.commands.options import tell
from gka.console import text_console
from gka.errors import InputError
from gka.storage import only_writer


def inspect(
    model: opt.Model,
    *,
    prompt: opt.Prompt = None,
    prompt_file: opt.PromptFile = None,
    positions: Annotated[
        int, typer.Option(help="Positions of the text at which the states are measured.")
    ] = 64,
    num_iter: opt.NumIter = None,
    ridge_ratio: opt.RidgeRatio = None,
    solver: opt.Solver = None,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    chunk: opt.Chunk = 4096,
    output: Annotated[
        Path, opt.output_folder("Folder for inspection.html and inspection.json.")
    ] = Path("inspection"),
) -> None:
    """Measure a model's memory on a text: decay, ridge, solver error, for each layer and head.

    The model needs a GKA layer. Writes an HTML page and a JSON file of the figures, and prints a table.
    """
    from gka.checkpoints.open import load_with_tokenizer
    from gka.serving import inspection, inspection_page
    from gka.storage import write_json, write_text

    opt.at_least_one("--chunk", chunk)
    opt.known_dtype(dtype)
    text = opt.read_prompt(prompt, prompt_file)
    opt.silence_libraries()
    loaded, tokenizer = load_with_tokenizer(model, dtype=dtype, device=opt.usable_device(device))
    loaded.set_solver(num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    if not ids:
        raise InputError("the text is empty: give --prompt, --prompt-file or standard input")
    page, figures = output / "inspection.html", output / "inspection.json"
    with only_writer(output, "--output"):
        found = inspection.inspect_model(loaded, ids, positions=positions, chunk=chunk)
        content = {"model_folder": str(model)} | found
        write_json(figures, content)
        write_text(page, inspection_page.page(content))
    console = text_console()
    console.print(inspection_page.table(content))
    tell(console, output, page=page.name, figures=figures.name)
