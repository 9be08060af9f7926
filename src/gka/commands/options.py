"""Shared by several commands: options, parsing of their values, and progress."""

import functools
import inspect
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

import gka
from gka.console import counted, leave_lost, lines, stop_signals, terminals
from gka.errors import InputError, RenamedWarning

if TYPE_CHECKING:
    from rich.console import Console

Number = TypeVar("Number", int, float)
INTERRUPTED = 128
"""Exit status of a command that a signal stopped, minus the signal's number, as in shells."""
MOST = 1_000_000
"""Limit of options that are counts; a larger number is taken for a mistake."""


def output_folder(help: str, **more: Any) -> Any:
    """The option `-o`, `--output` of a command that writes a folder."""
    return typer.Option("--output", "-o", help=help, **more)


def _of_model(help: str) -> Any:
    """An option that overrides a setting of the model."""
    return typer.Option(help=help, show_default="the model's own")


Model = Annotated[Path, typer.Argument(help="Folder of a run or of a saved model.")]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="A UTF-8 file with the prompt.", show_default="standard input"),
]
Chunk = Annotated[
    int, typer.Option(help="Tokens read at a time; fewer take less memory, same result.")
]
NumIter = Annotated[int | None, _of_model("Solver steps; 0: linear attention, no ridge.")]
RidgeRatio = Annotated[float | None, _of_model("a in lambda = a |H|.")]
Solver = Annotated[str | None, _of_model("chebyshev; adaptive or cg: fewer steps, same bound.")]
Device = Annotated[
    str | None, typer.Option(help="As in cpu or cuda:1.", show_default="cuda where there is one")
]
Dtype = Annotated[
    str,
    typer.Option(help="Dtype of the weights: auto (as stored), float32, bfloat16 or float16."),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="A text file or folder (UTF-8); can be given several times.",
        show_default="Python's standard library",
    ),
]


# Option names of an earlier release, by command. They work, with a warning.
_FORMER = {
    "train": {
        "--precision": "--dtype",
        "--num-layers": "--num-hidden-layers",
    },
    "prime": {
        "--data": "--text",
        "--precision": "--dtype",
        "--stage1-steps": "--stage1-max-steps",
        "--stage2-steps": "--stage2-max-steps",
    },
    "generate": {"--prefill-chunk": "--chunk"},
    "inspect": {"--file": "--prompt-file", "--prefill-chunk": "--chunk"},
    "mqar": {"--steps": "--max-steps"},
    "recall": {"--correlation": "--correlations"},
}


class Command(TyperCommand):
    """A command that also accepts the former names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._renamed(args)))

    def _renamed(self, args: list[str]) -> Iterator[str]:
        """The arguments with present names; values of options are left unchanged."""
        former = _FORMER.get(self.name or "", {})
        flags = {name for p in self.params if getattr(p, "is_flag", False) for name in p.opts}
        value = False
        for position, word in enumerate(args):
            if word == "--" and not value:
                yield from args[position:]
                return
            name, equals, rest = word.partition("=")
            if not value and name in former:
                says = f"{name} is now {former[name]}; the old name goes with the next release"
                warnings.warn(says, RenamedWarning, stacklevel=2)
                word = former[name] + equals + rest
            value = not value and word.startswith("-") and not equals and word not in flags
            yield word


def _show_version(wanted: bool) -> None:
    """Print the version and exit, if `wanted`."""
    if wanted:
        print(f"gated-kalmanet {gka.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
]


def with_version(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option `--version`."""

    @functools.wraps(command)
    def run(*, version: bool, **values: Any) -> None:
        command(**values)

    place = inspect.Parameter.KEYWORD_ONLY
    version = inspect.Parameter("version", place, default=False, annotation=Version)
    signature = inspect.signature(command)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), version]
    )
    run.__annotations__ = {**command.__annotations__, "version": Version}
    return run


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers of a text such as "1,3".

    Raises:
        InputError: a part is no number; the message names the option.
    """
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} is {text!r}; expected {what} and commas, as in 1,3") from None


def names(text: str) -> tuple[str, ...]:
    """Names of a text such as "gka, gla"."""
    return tuple(name.strip() for name in text.split(","))


def at_least_one(option: str, number: int) -> int:
    """`number`; raises `InputError` unless it is in 1..`MOST`."""
    if number < 1:
        raise InputError(f"{option} is {number}; expected 1 or more")
    if number > MOST:
        raise InputError(f"{option} is {number}; expected {MOST} or less")
    return number


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt: an argument, the text of a UTF-8 file, or else standard input.

    Raises:
        InputError: both are given, the file cannot be read, or the text is not UTF-8.
    """
    if text is not None and file is not None:
        raise InputError("prompt and prompt_file exclude each other; give one of them")
    if text is not None:
        try:
            # Python decodes an argument's bytes that are not UTF-8 to lone surrogates.
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt is not valid UTF-8 (at character {error.start})") from None
        return text
    try:
        raw = file.read_bytes() if file else sys.stdin.buffer.read()
        return raw.decode()
    except OSError as error:
        raise InputError(f"prompt_file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"prompt_file {file}" if file else "prompt on standard input"
        raise InputError(
            f"{where} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        ) from None


def usable_device(device: str | None) -> str:
    """The given device; for None, "cuda" if torch has a GPU, else "cpu".

    Raises:
        InputError: torch cannot use the device.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used: {reason}") from None
    return device


def known_dtype(dtype: str) -> str:
    """`dtype`; raises `InputError` unless weights can be loaded in it."""
    from gka.checkpoints.open import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    return dtype


def silence_libraries() -> None:
    """Turn off transformers' progress bars and warnings; print what the output's encoding lacks as "?"."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def tell(console: "Console", folder: Path, **places: str) -> None:
    """Print the paths of results in `folder`, each after its keyword, as in "figures: runs/a/b.json"."""
    for what, name in places.items():
        console.print(f"{what + ':':8} {folder / name}", highlight=False, soft_wrap=True)


class _Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP, with its number in `signal`."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = number


@contextmanager
def counting(
    console: "Console", what: str, total: int, kept: Path
) -> Iterator[Callable[[str], None]]:
    """Show progress over pieces of work whose results are kept in a file; exit the command at a signal.

    Args:
        console: where to show it.
        what: name of the pieces, such as "cells".
        total: number of pieces.
        kept: the file of results, for the message at a signal.

    Yields:
        A function that prints a line about a finished piece and counts it.
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
    """Raise `_Stopped` at SIGINT, SIGTERM and SIGHUP, so that the command's other processes end too."""
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
