"""`gka recall` and `gka mqar`: options to settings, results to files. Heavy imports come last."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gka.commandline import (
    counted,
    leave_lost,
    lines,
    status,
    stop_signals,
    terminals,
    text_console,
)
from gka.errors import InputError
from gka.storage import only_writer

if TYPE_CHECKING:
    from rich.console import Console

    from gka.evaluation.mqar_sweep import Sweep

Number = TypeVar("Number", int, float)
MOST = 1_000_000
"""Seeds, steps and processes at most: beyond it a number is a slip."""

RECALL_NEXT = """Next:
  gka recall --ridge-ratios 0.002,0.02   a smaller ridge reads more exactly
  gka mqar                               the same question to trained models (about 20 minutes)"""


def recall(
    *,
    head_dim: Annotated[int, typer.Option(help="Size of keys and values, K = V.")] = 64,
    pairs: Annotated[
        str, typer.Option(help="Numbers N of pairs to write.")
    ] = "4,8,16,24,32,48,64,96,128,192,256",
    correlation: Annotated[
        str, typer.Option(help="Expected cosines between keys, each from 0 to below 1.")
    ] = "0,0.5,0.9",
    ridge_ratios: Annotated[
        str, typer.Option(help="a in lambda = a |H|, for GKA and exact ridge.")
    ] = "0.005,0.02,0.1",
    num_iters: Annotated[str, typer.Option(help="Chebyshev steps of GKA.")] = "5,30",
    seeds: Annotated[int, typer.Option(help="How many draws of keys and values.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for recall.json and recall.png.")] = Path(
        "runs/recall"
    ),
) -> None:
    """Write N correlated key-value pairs into untrained memories and read them back; in seconds.

    Compares linear attention, DeltaNet, Gated KalmaNet and exact ridge regression at equal head
    size. Lists are numbers and commas. See also `gka mqar`, which trains.
    """
    ratios = _numbers("--ridge-ratios", ridge_ratios, float)
    iterations = _numbers("--num-iters", num_iters, int)
    wanted = {
        "head_dim": head_dim,
        "pairs": _numbers("--pairs", pairs, int),
        "correlations": _numbers("--correlation", correlation, float),
        "seeds": tuple(range(_at_least_one("--seeds", seeds))),
    }
    with only_writer(output, "--output"):
        _run_recall(wanted, ratios, iterations, output)


def mqar(
    *,
    preset: Annotated[
        str, typer.Option(help="cpu (minutes), gpu (hours) or zoology (the paper's sizes).")
    ] = "cpu",
    mixers: Annotated[
        str | None, typer.Option(help="Mixers to compare, as in gka,gla,gla+attention.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Width and head size of the models, as in 16x16,64x32.")
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Rates that every mixer is tried with, as in 0.005,0.01.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, from 0 on.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each training.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Trainings at the same time. [default: on a CPU its cores, else 1]"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train, as in cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for mqar.json and mqar.png.")] = Path(
        "runs/mqar"
    ),
) -> None:
    """Train two-layer models on multi-query associative recall (MQAR) and compare mixers.

    Every mixer is trained at every size with every learning rate; the best rate is repeated with
    further seeds. Finished trainings are kept in OUTPUT/mqar.json: run the same command again to go
    on after an interruption.
    """
    changes: dict[str, Any] = {
        "mixers": None if mixers is None else tuple(name.strip() for name in mixers.split(",")),
        "sizes": None if sizes is None else _size_pairs("--sizes", sizes),
        "learning_rates": None
        if learning_rates is None
        else _numbers("--learning-rates", learning_rates, float),
        "seeds": None if seeds is None else tuple(range(_at_least_one("--seeds", seeds))),
    }
    sweep = _sweep(preset, {k: v for k, v in changes.items() if v is not None}, steps)
    _check_device(device)
    if processes is None:
        processes = (os.cpu_count() or 1) if device == "cpu" else 1
    _at_least_one("--processes", processes)
    with only_writer(output, "--output"):
        _run_mqar(sweep, output, processes, device)


def _run_recall(
    wanted: dict[str, Any], ratios: tuple[float, ...], iterations: tuple[int, ...], folder: Path
) -> None:
    from gka.data.files import write_json
    from gka.evaluation.memories import compared_memories
    from gka.evaluation.plots import plot_recall
    from gka.evaluation.recall import RecallSettings, run_recall, what_was_learnt
    from gka.evaluation.results import environment, one_thread
    from gka.evaluation.tables import recall_key, recall_tables

    settings, memories = RecallSettings(**wanted), compared_memories(ratios, iterations)
    console = text_console()
    with status(console, "writing and reading"), one_thread():
        content = {"environment": environment()} | run_recall(settings, memories)
        write_json(folder / "recall.json", content)
        plot_recall(content, folder / "recall.png")
    for line in what_was_learnt(content):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    for table in recall_tables(content):
        console.print(table)
    console.print(recall_key(content), highlight=False, markup=False, soft_wrap=True)
    _tell(console, folder, "recall")
    console.print(RECALL_NEXT, highlight=False, markup=False, soft_wrap=True)


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP; `signal` is which."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = number


@contextmanager
def _stopping_by_signal() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `_Stopped`, so that trainings in other processes are ended too."""
    shown = terminals()

    def stop(number: int, _frame: Any) -> None:
        leave_lost(shown)
        raise _Stopped(number)

    former = {}
    if threading.current_thread() is threading.main_thread():
        for number in stop_signals():
            former[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _run_mqar(sweep: "Sweep", folder: Path, processes: int, device: str) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    from gka.evaluation.mqar_cell import Cell
    from gka.evaluation.mqar_sweep import run_sweep
    from gka.evaluation.plots import plot_mqar
    from gka.evaluation.tables import mqar_tables

    console, file = text_console(), folder / "mqar.json"
    columns = TextColumn("trainings"), BarColumn(), MofNCompleteColumn(), Elapsed()
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=len(sweep))
    try:
        with _stopping_by_signal(), progress, lines(console, counted("trainings", progress)):

            def show(cell: Cell, result: dict[str, Any]) -> None:
                found = " ".join(f"{accuracy:.3f}" for accuracy in result["test_accuracy"])
                took = f"{result['steps']} steps, {result['seconds']:.0f} s"
                progress.console.print(f"{found}  {cell}  ({took})", highlight=False)
                progress.advance(bar)

            content = run_sweep(sweep, file, processes=processes, device=device, on_cell=show)
    except _Stopped as stopped:
        console.print(f"Stopped. Finished trainings are kept in {file}.", soft_wrap=True)
        console.print("Run the same command again to go on.")
        raise typer.Exit(128 + stopped.signal) from None
    plot_mqar(content, folder / "mqar.png")
    for table in mqar_tables(content):
        console.print(table)
    _tell(console, folder, "mqar")


def _sweep(preset: str, changes: dict[str, Any], steps: int | None) -> "Sweep":
    """The preset with what the options change."""
    from dataclasses import replace

    from gka.evaluation.mqar_presets import PRESETS

    if preset not in PRESETS:
        raise InputError(f"--preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    sweep = replace(PRESETS[preset], **changes)
    if steps is None:
        return sweep
    _at_least_one("--steps", steps)
    mixtures = tuple((tasks, replace(budget, steps=steps)) for tasks, budget in sweep.mixtures)
    return replace(sweep, mixtures=mixtures)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} is {text!r}; expected {what} and commas, as in 1,3") from None


def _size_pairs(option: str, text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in text.split(",")]
        return tuple((width, head_dim) for width, head_dim in sizes)
    except ValueError:
        raise InputError(f"{option} is {text!r}; expected WIDTHxHEAD, as in 16x16,64x32") from None


def _at_least_one(option: str, number: int) -> int:
    if number < 1:
        raise InputError(f"{option} is {number}; expected 1 or more")
    if number > MOST:
        raise InputError(f"{option} is {number}; expected {MOST} or less")
    return number


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used: {reason}") from None


def _tell(console: "Console", folder: Path, name: str) -> None:
    for what, ending in (("figures", "json"), ("plot", "png")):
        path = folder / f"{name}.{ending}"
        console.print(f"{what + ':':8} {path}", highlight=False, soft_wrap=True)
