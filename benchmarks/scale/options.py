"""The options of `python -m benchmarks.run scale`."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.scale.cells import ROWS, TRIED

from gka.parallel.planner import card_names

DEFAULT_ROWS = ("dp", "cp64k", "cp256k", "mixed")
COMPILED = ("dp", "dp-kept", "cp64k", "mixed")
PRODUCTS = ("float32", "bfloat16")
NUMBERS = {
    "sequences": (8, "that a GPU reads in a step of dp"),
    "steps": (5, "that are timed, of dp four times as many"),
    "warm-up": (2, "steps before them, after the first"),
    "minutes": (9.5, "after which nothing runs any more"),
    "launch-seconds": (300.0, "at most for one number of GPUs"),
    "cell-seconds": (150.0, "after which a cell is taken to hang"),
}


def counts(text: str) -> list[int]:
    """An argparse type: numbers of GPUs, separated by commas, in the order in which they are measured."""
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"numbers of GPUs from 1 on, such as 1,2,4; got {text!r}")
    return list(dict.fromkeys(int(word) for word in words))


def names(known: tuple[str, ...]) -> Any:
    """An argparse type: names of `known`, separated by commas; "none" for none of them."""

    def parsed(text: str) -> tuple[str, ...]:
        found = tuple(text.split(",")) if text != "none" else ()
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there are {', '.join(known)}; got {name!r}")
        return found

    return parsed


def parse(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked; "compile" and "check" filled in."""
    made = results.parser("scale", description, device=None)
    add, rows = made.add_argument, tuple(ROWS)
    add("--gpus", type=counts, default=[1, 2, 4, 8], help="in this order (1,2,4,8)")
    add("--rows", type=names(rows), default=DEFAULT_ROWS,
        help=f"of {','.join(rows)} ({','.join(DEFAULT_ROWS)})")  # fmt: skip
    add("--compile", type=names(rows),
        help=f"rows whose layers are compiled, or none ({','.join(COMPILED)}; of a trial none)")  # fmt: skip
    add("--checkpoint", choices=("auto", *TRIED), default="auto",
        help="auto: the least that fits one GPU by the plan, more if memory does not suffice")  # fmt: skip
    add("--check", type=names(PRODUCTS),
        help="products with which losses are compared, or none; float32 compiles kernels of its own, for "
        "minutes (bfloat16; of a trial both)")  # fmt: skip
    for name, (default, told) in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{told} ({default})")
    add("--card",
        help=f"speeds of the plans: {', '.join(card_names())} or a file of gka plan --measure")  # fmt: skip
    add("--tiny", action="store_true",
        help="a tiny model, two processes on the CPU; times mean nothing")  # fmt: skip
    add("--from", type=Path, nargs="+", dest="stored", metavar="JSON",
        help="write table and picture of these results, plans of other --gpus included")  # fmt: skip
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = results.parse(made, arguments)
    for name in NUMBERS:
        if getattr(options, name.replace("-", "_")) < 1:
            made.error(f"--{name} must be 1 or more")
    if options.check is None:
        options.check = PRODUCTS if options.tiny else ("bfloat16",)
    if options.compile is None:
        options.compile = () if options.tiny else COMPILED
    return options
