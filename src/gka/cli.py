"""The command `gka`: registers the commands of each floor, and turns errors into exit codes."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from gka.errors import InputError
from gka.evaluation.command import mqar, recall
from gka.training.command import generate, train
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
for command in (train, generate, prime, convert, recall, mqar):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command (of `sys.argv` unless given) and exit: 0, 2 for unusable input, 128 + signal."""
    try:
        app(args=arguments)
    except InputError as error:
        print(f"gka: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
