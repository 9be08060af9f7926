"""`gka mqar`: a sweep of trainings on associative recall."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gka.commands import options as opt
from gka.commands.options import counting, tell
from gka.console import text_console
from gka.errors import InputError
from gka.storage import only_writer

if TYPE_CHECKING:
    from gka.evaluation.mqar_cell import Cell
    from gka.evaluation.mqar_sweep import Sweep


def _of_preset(help: str) -> Any:
    """An option that overrides the preset."""
    return typer.Option(help=help, show_default="the preset's")


def mqar(
    *,
    preset: Annotated[
        str,
        typer.Option(
            help="Minutes (cpu), hours (gpu) or the paper's sizes (zoology).",
            metavar="cpu|gpu|zoology",
        ),
    ] = "cpu",
    mixers: Annotated[
        str | None,
        _of_preset("Mixers to compare, as in gka,gla,gla+attention."),
    ] = None,
    sizes: Annotated[
        str | None,
        _of_preset("Width and head size of the models, as in 16x16,64x32."),
    ] = None,
    learning_rates: Annotated[
        str | None,
        _of_preset("Learning rates to try with every mixer, as in 0.005,0.01."),
    ] = None,
    seeds: Annotated[int | None, _of_preset("Number of seeds, from 0 on.")] = None,
    max_steps: Annotated[
        int | None,
        _of_preset("Optimizer steps of each training."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Trainings at the same time.", show_default="the cores of a CPU; 1 on a GPU"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="As in cpu or cuda:1.")] = "cpu",
    output: Annotated[Path, opt.output_folder("Folder for mqar.json and mqar.png.")] = Path(
        "runs/mqar"
    ),
) -> None:
    """Train two-layer models on multi-query associative recall (MQAR) and compare mixers.

    Every mixer is trained at every size with every learning rate; the best rate is repeated with further
    seeds. Finished trainings are kept in OUTPUT/mqar.json: repeat the command to continue a stopped run.
    """
    changes: dict[str, Any] = {
        "mixers": None if mixers is None else opt.names(mixers),
        "sizes": None if sizes is None else _size_pairs("--sizes", sizes),
        "learning_rates": None
        if learning_rates is None
        else opt.numbers("--learning-rates", learning_rates, float),
        "seeds": None if seeds is None else tuple(range(opt.at_least_one("--seeds", seeds))),
    }
    sweep = _sweep(preset, {k: v for k, v in changes.items() if v is not None}, max_steps)
    device = opt.usable_device(device)
    if processes is None:
        processes = (os.cpu_count() or 1) if device == "cpu" else 1
    opt.at_least_one("--processes", processes)
    with only_writer(output, "--output"):
        _run(sweep, output, processes, device)


def _run(sweep: "Sweep", folder: Path, processes: int, device: str) -> None:
    from gka.evaluation.mqar_sweep import run_sweep
    from gka.evaluation.plots import plot_mqar
    from gka.evaluation.results import mqar_tables

    console, file = text_console(), folder / "mqar.json"
    with counting(console, "trainings", len(sweep), file) as done:

        def show(cell: "Cell", result: dict[str, Any]) -> None:
            found = " ".join(f"{accuracy:.3f}" for accuracy in result["test_accuracy"])
            done(f"{found}  {cell}  ({result['steps']} steps, {result['seconds']:.0f} s)")

        content = run_sweep(sweep, file, processes=processes, device=device, on_cell=show)
    plot_mqar(content, folder / "mqar.png")
    for table in mqar_tables(content):
        console.print(table)
    tell(console, folder, figures="mqar.json", plot="mqar.png")


def _sweep(preset: str, changes: dict[str, Any], max_steps: int | None) -> "Sweep":
    """The preset, changed by the options."""
    from dataclasses import replace

    from gka.evaluation.mqar_sweep import PRESETS

    if preset not in PRESETS:
        raise InputError(f"--preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    sweep = replace(PRESETS[preset], **changes)
    if max_steps is None:
        return sweep
    steps = opt.at_least_one("--max-steps", max_steps)
    mixtures = tuple((tasks, replace(budget, steps=steps)) for tasks, budget in sweep.mixtures)
    return replace(sweep, mixtures=mixtures)


def _size_pairs(option: str, text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in text.split(",")]
        return tuple((width, head_dim) for width, head_dim in sizes)
    except ValueError:
        raise InputError(f"{option} is {text!r}; expected WIDTHxHEAD, as in 16x16,64x32") from None
