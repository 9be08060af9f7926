"""The command `gka`: registers the commands of each floor, and turns errors into exit codes."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import gka
from gka.commandline import to_nowhere, wait_without_spinning
from gka.errors import InputError
from gka.evaluation.command import mqar, recall
from gka.evaluation.evaluate_command import evaluate, lm_eval
from gka.serving.command import generate
from gka.serving.inspect_command import inspect
from gka.training.command import train
from gka.training.convert import convert
from gka.training.priming.command import prime

app = typer.Typer(
    name="gka",
    help="Gated KalmaNet: language models whose memory is a ridge regression over the whole past.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gated-kalmanet {gka.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    pass


for command in (train, prime, generate, inspect, convert, recall, mqar, evaluate):
    app.command()(command)
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
