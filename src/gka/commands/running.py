"""What commands that work for long have in common: going on, stopping by a signal, and where results are."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gka.commands.options import silence_libraries
from gka.console import counted, leave_lost, lines, stop_signals, terminals, text_console

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 128
"""Exit status of a command that a signal stopped, plus the signal's number: the shell's convention."""


def console() -> "Console":
    """The console of a training run: of several processes one speaks, and transformers is silent."""
    from gka.training.folder import is_main_process

    silence_libraries()
    return text_console(quiet=not is_main_process())


def resumes(folder: Path, console: "Console", resume: bool, *, may_start: bool) -> bool:
    """Whether a run goes on; with `resume` and none in the folder it starts if it `may_start`.

    So a whole command can be repeated until its run is complete, by make or by a job queue.
    """
    from gka.training.folder import RUN

    if resume and may_start and not (folder / RUN).exists():
        console.print(f"no run in {folder} yet: starting one", highlight=False, soft_wrap=True)
        return False
    return resume


@contextmanager
def stopped(command: str, folder: Path, console: "Console", steps: str) -> Iterator[None]:
    """Say how to go on with a training that a signal stops in the block, and exit; `steps` is of how many."""
    from gka.training.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        console.print(
            f"Stopped after step {stop.step} {steps}; the checkpoint is saved.\n"
            f"Resume: gka {command} --resume --output {folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED + stop.signal) from None


def tell(console: "Console", folder: Path, **places: str) -> None:
    """Print where in `folder` the results are, each under what it is."""
    for what, name in places.items():
        console.print(f"{what + ':':8} {folder / name}", highlight=False, soft_wrap=True)


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP; `signal` is which."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = number


@contextmanager
def counting(
    console: "Console", what: str, total: int, kept: Path
) -> Iterator[Callable[[str], None]]:
    """A bar over pieces of work whose results are kept in a file; a signal ends the command.

    Args:
        console: where it is shown.
        what: the pieces, such as "cells".
        total: how many there are.
        kept: the file.

    Yields:
        What prints a line about a piece that is done, and counts it.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), Elapsed()
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=total)

    def done(line: str) -> None:
        progress.console.print(line, highlight=False, soft_wrap=True)
        progress.advance(bar)

    try:
        with _stopping_by_signal(), progress, lines(console, counted(what, progress)):
            yield done
    except _Stopped as stop:
        console.print(f"Stopped. Finished {what} are kept in {kept}.", soft_wrap=True)
        console.print("Run the same command again to go on.")
        raise typer.Exit(INTERRUPTED + stop.signal) from None


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
