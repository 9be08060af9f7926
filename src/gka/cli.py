"""The command `gka`: registers the commands of each floor, and turns errors into exit codes."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

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
    """Run a command (of `sys.argv` unless given) and exit: 0, 2 for unusable input, 128 + signal."""
    try:
        app(args=arguments)
    except InputError as error:
        print(f"gka: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
