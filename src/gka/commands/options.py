"""The options that several commands have, each under one name, and what is read from their text."""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

import gka
from gka.errors import InputError, RenamedWarning

Number = TypeVar("Number", int, float)
MOST = 1_000_000
"""Seeds, steps and processes at most: beyond it a number is a slip."""


def output_folder(help: str, **more: Any) -> Any:
    """The option `-o`, `--output` of a command that writes into a folder."""
    return typer.Option("--output", "-o", help=help, **more)


def _of_model(help: str) -> Any:
    """An option that changes a setting of the model."""
    return typer.Option(help=help, show_default="the model's own")


Model = Annotated[Path, typer.Argument(help="Folder of a run or of a saved model.")]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="Text.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="A UTF-8 file with the text instead.", show_default="standard input"),
]
Chunk = Annotated[
    int, typer.Option(help="Tokens read at a time; fewer take less memory, same result.")
]
NumIter = Annotated[int | None, _of_model("Solver steps; 0 leaves the ridge out.")]
RidgeRatio = Annotated[float | None, _of_model("a in lambda = a |H|.")]
Solver = Annotated[str | None, _of_model("chebyshev; adaptive or cg: fewer steps, same bound.")]
Device = Annotated[
    str | None, typer.Option(help="As in cpu or cuda:1.", show_default="cuda where there is one")
]
Dtype = Annotated[
    str,
    typer.Option(help="Of the weights: auto (as they are stored), float32, bfloat16 or float16."),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="A text file or folder (UTF-8); can be given several times.",
        show_default="Python's standard library",
    ),
]


# Names of an earlier release, by command; they work and warn.
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
    """A command that also knows its options by their former names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._renamed(args)))

    def _renamed(self, args: list[str]) -> Iterator[str]:
        """The arguments with the names of today; what is the value of an option is left alone."""
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
    """Print the version and end, if that is what was asked for."""
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
        InputError: naming the option.
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
    """`number`, if it is one of 1 to `MOST`; an `InputError` otherwise."""
    if number < 1:
        raise InputError(f"{option} is {number}; expected 1 or more")
    if number > MOST:
        raise InputError(f"{option} is {number}; expected {MOST} or less")
    return number


def usable_device(device: str | None) -> str:
    """The device that was asked for, or else a GPU if there is one.

    Raises:
        InputError: torch cannot use it here.
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
    """`dtype`, if weights can be loaded in it; an `InputError` otherwise."""
    from gka.checkpoints.open import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    return dtype


def silence_libraries() -> None:
    """Keep transformers' own bars and warnings out of the commands' output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
