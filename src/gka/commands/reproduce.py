"""`gka reproduce`: an experiment about a claim, from measurements to a verdict."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gka.commands import options as opt
from gka.commands.options import counting
from gka.console import text_console
from gka.errors import InputError
from gka.storage import only_writer

if TYPE_CHECKING:
    from rich.console import Console

    from gka.experiments.reproduce.runner import Reproduction

ROOT = Path("runs/reproduce")


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="Name of the experiment.", show_default="a list of all")
    ] = None,
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: minutes on two cores of a CPU.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes that only show that it runs: seconds.")
    ] = False,
    device: opt.Device = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Number of seeds, from 0 on; more later are added.",
            show_default="the experiment's",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="End before a cell that would take longer in all.", show_default="no limit"
        ),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(
            help="Cells that share the device, of an experiment that trains tiny models.",
            show_default="the experiment's on a GPU; 1 on a CPU",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a `gka train` run, for rows of a trained model.", show_default="none"
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Folder or archive of gka.experiments.corpora.",
            show_default="built from what is here",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that measure at the same time.", min=1)
    ] = 1,
    output: Annotated[
        Path | None,
        opt.output_folder(
            "Folder for NAME.json, NAME.md and NAME.png.",
            show_default="runs/reproduce/ and the size",
        ),
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="List experiments, claims and last verdicts.")
    ] = False,
) -> None:
    """Test a claim about the method: measure, compare with it, and give a verdict.

    Without a name it lists the experiments. Finished cells are kept: repeat the command to continue a
    stopped run, and to try failed cells again. It ends with status 1 if a cell failed.
    """
    console = text_console()
    if name is None or list_all:
        _list(console, output or ROOT)
        return
    if quick and smoke:
        raise InputError("--quick and --smoke exclude each other; give one of them")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes:g}; expected above 0")
    from gka.experiments.reproduce.experiment import Options
    from gka.experiments.reproduce.registry import find
    from gka.experiments.reproduce.runner import Reproduction

    size = "smoke" if smoke else "quick" if quick else "full"
    experiment = find(name)
    number = experiment.seeds[size] if seeds is None else opt.at_least_one("--seeds", seeds)
    where = opt.usable_device(device)
    if together is None:
        together = experiment.together if where.startswith("cuda") else 1
    opt.at_least_one("--together", together)
    folder = output or ROOT / size
    trained = None if model is None else str(model)
    given = Options(where, tuple(range(number)), trained, folder, corpus)
    command = _command(name, size, where, seeds, {"--model": model, "--corpus": corpus})
    opt.silence_libraries()
    with only_writer(folder, "--output"):
        reproduction = Reproduction(experiment, size, given, folder, command)
        _run(console, reproduction, folder, minutes, (together, processes))


def _command(
    name: str, size: str, device: str, seeds: int | None, read: Mapping[str, Path | None]
) -> str:
    """The command line that measures this again; `read`: files by option."""
    words = ["gka", "reproduce", name, *(["--" + size] if size != "full" else [])]
    words += ["--device", device] + ([] if seeds is None else ["--seeds", str(seeds)])
    words += [word for option, path in read.items() if path for word in (option, path.name)]
    return shlex.join(words)


def _run(
    console: "Console",
    reproduction: "Reproduction",
    folder: Path,
    minutes: float | None,
    at_once: tuple[int, int],
) -> None:
    """Say the plan, run, report, and say what is left or failed; `at_once`: cells, and processes."""
    name, plan = reproduction.experiment.name, reproduction.plan()
    shared = f", by {at_once[1]} processes" if at_once[1] > 1 else ""
    console.print(f"{name}, {reproduction.size}: {plan}{shared}", highlight=False, soft_wrap=True)
    file = folder / f"{name}.json"
    with counting(console, "cells", len(plan.cells), file) as done:
        left = reproduction.run(
            minutes,
            lambda cell, record: done(
                f"{cell.key}: {record['seconds']:.1f} s"
                + (f", failed: {record['reason']}" if record["state"] == "failed" else "")
            ),
            *at_once,
        )
    verdict = reproduction.report()
    for check in verdict["checks"]:
        mark = {True: "yes ", False: "no  ", None: "open"}[check["passed"]]
        console.print(f"{mark} {check['of']}: {check['text']}: {check['found']}", soft_wrap=True)
    console.print(f"verdict: {verdict['claim']}", highlight=False)
    if left:
        rest = reproduction.plan().total / 60
        console.print(
            f"{len(left)} cells did not fit into {minutes:g} minutes; they take about {rest:.1f}"
            " more. Run the same command again to go on.",
            highlight=False,
            soft_wrap=True,
        )
    if failed := reproduction.failed():
        console.print(
            f"{len(failed)} cells failed: {'; '.join(failed)}. Run the same command again to try them"
            " again.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _list(console: "Console", folder: Path) -> None:
    """Print every experiment with its claim and its last verdict."""
    from gka.experiments.reproduce.registry import EXPERIMENTS
    from gka.experiments.reproduce.runner import last_verdicts

    verdicts = last_verdicts(folder)
    for name, experiment in EXPERIMENTS.items():
        size, verdict = verdicts.get(name, ("", "not run"))
        told = f"{verdict} ({size})" if size else verdict
        console.print(
            f"{name}: {experiment.title}. Last verdict: {told}", highlight=False, soft_wrap=True
        )
        console.print(
            f"    {experiment.claim} ({experiment.source})", highlight=False, soft_wrap=True
        )
