"""The command `gka`: its commands, and errors as exit codes."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import getdoc
from typing import Any, NoReturn

import typer

from gka.commands.convert import convert
from gka.commands.evaluate import evaluate, lm_eval
from gka.commands.generate import generate
from gka.commands.inspect import inspect
from gka.commands.mqar import mqar
from gka.commands.options import Command, Version, with_version
from gka.commands.prime import prime
from gka.commands.recall import recall
from gka.commands.train import train
from gka.console import to_nowhere, wait_without_spinning
from gka.errors import InputError, RenamedWarning

app = typer.Typer(
    name="gka",
    help="Gated KalmaNet: language models whose memory is a ridge regression over the whole past.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _common(version: Version = False) -> None:
    pass


def _paragraphs(command: Callable[..., None]) -> str:
    """Its docstring, each paragraph one line, which a help page breaks to its own width."""
    paragraphs = (getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for command in (train, prime, generate, inspect, convert, recall, mqar, evaluate):
    app.command(help=_paragraphs(command), cls=Command)(with_version(command))
# its arguments, --help too, are the harness's own
app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(lm_eval)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command (of `sys.argv` unless given) and exit: 0, 2 for unusable input, 128 + signal.

    Errors of the disk (full, read-only, no permission) are unusable input, wherever they occur.
    """
    wait_without_spinning()
    try:
        try:
            with _names_said():
                app(args=arguments)
        finally:
            sys.stdout.flush()  # a full disk behind it shows here rather than at the very end
    except InputError as error:
        _refuse(str(error))
    except BrokenPipeError:  # a reader that leaves
        to_nowhere(1)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            to_nowhere(1)  # what is left would fail again
        _refuse(f"{error.filename or 'the output'} cannot be used: {error.strerror or error}")
    sys.exit(0)


def _refuse(message: str) -> NoReturn:
    """Say on one line what is wrong, and exit with 2."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(f"gka: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def _names_said() -> Iterator[None]:
    """Say which option or key has another name now as an error is said, without a place in the code."""

    def say(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, RenamedWarning):
            print(f"gka: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        show, warnings.showwarning = warnings.showwarning, say
        yield
