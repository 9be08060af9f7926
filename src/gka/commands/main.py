"""The command `gka`: its subcommands, and exit statuses of errors."""

import contextlib
import os
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
from gka.commands.plan import plan
from gka.commands.prime import prime
from gka.commands.recall import recall
from gka.commands.reproduce import reproduce
from gka.commands.tokenize import tokenize
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
    """The command's docstring with each paragraph on one line, which the help page wraps to its width."""
    paragraphs = (getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for command in (
    train, plan, prime, tokenize, generate, inspect, convert, recall, mqar, evaluate, reproduce,
):  # fmt: skip
    app.command(help=_paragraphs(command), cls=Command)(with_version(command))
# All arguments, --help included, are passed to the harness.
app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(lm_eval)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command (from `sys.argv` if `arguments` is None) and exit.

    Statuses: 0; 1 if the reader of a pipe has gone; 2 for unusable input and for errors of the disk (full,
    read-only, no permission), wherever they occur; 128 + the signal's number if one stopped the command.
    """
    wait_without_spinning()
    try:
        try:
            with _names_said():
                app(args=arguments)
        finally:
            sys.stdout.flush()  # so that a full disk raises here and not when the interpreter exits
    except InputError as error:
        shared = getattr(error, "on_every_rank", False) and os.environ.get("RANK", "0") != "0"
        if shared or not str(error):  # another process prints it
            sys.exit(2)
        _refuse(str(error))
    except BrokenPipeError:  # the reader of a pipe has gone
        to_nowhere(1)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            to_nowhere(1)  # flushing the rest would fail again
        _refuse(f"{error.filename or 'the output'} cannot be used: {error.strerror or error}")
    sys.exit(0)


def _refuse(message: str) -> NoReturn:
    """Print an error on one line and exit with status 2."""
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"gka: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def _names_said() -> Iterator[None]:
    """Print a `RenamedWarning` as errors are printed, without a source line."""

    def say(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, RenamedWarning):
            print(f"gka: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        show, warnings.showwarning = warnings.showwarning, say
        yield
