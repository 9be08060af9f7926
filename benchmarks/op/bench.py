"""The command line of `python -m benchmarks.gpu`."""

import argparse
import sys
from pathlib import Path

import torch
from benchmarks import contenders as registry
from benchmarks.contenders import LayerSize, Size

from gka.ops.backends import known_backends

SHAPES = ((1, 8192, 16), (4, 8192, 8), (8, 2048, 16), (1, 131072, 16))
LAYER = LayerSize(hidden=2048, heads=16, dim=128, length=8192)


def shapes(text: str) -> list[tuple[int, int, int]]:
    """BxTxH,BxTxH,..."""
    found = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise argparse.ArgumentTypeError(
                f"sizes are BxTxH, as in 1x8192x16,4x8192x8; got {part!r}"
            )
        batch, length, heads = map(int, numbers)
        found.append((batch, length, heads))
    return found


def peers(text: str) -> list[str]:
    """Names, or none."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in registry.PEERS:
            known = ", ".join([*registry.PEERS, "none"])
            raise argparse.ArgumentTypeError(f"there are {known}; got {name!r}")
    return names


def dims(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"dims are numbers, as in 64,128; got {text!r}") from None
    return found


def parse(description: str) -> argparse.Namespace:
    """The command line, with what follows from it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/bench-gpu"), help="folder of the results")
    add("--sizes", type=shapes, help="BxTxH,... (default: the four of docs/performance.md)")
    add("--dims", type=dims, help="K = V (128,64)")
    add("--quick", action="store_true", help="two sizes, D = 128, no layer, no mesa_net")
    add("--limit-seconds", type=float, help="no function is begun later (240; --quick: 75)")
    add("--seconds", type=float, default=0.3, help="time to spend on one measurement (0.3)")
    add("--peers", type=peers, help=f"of {','.join(registry.PEERS)}, or none (all)")
    add("--backend", choices=[b for b in known_backends() if b != "reference"], default="auto")
    add("--keys", choices=["silu-mean", "silu", "gaussian"], default="silu-mean")
    add("--layer", action=argparse.BooleanOptionalAction, help="the layers too")
    add("--layer-size", help=argparse.SUPPRESS, default=LAYER, type=parse_layer)
    add("--profile", action="store_true", help="the kernels of one training step, at the end")
    add("--update", type=Path, metavar="PAGE", help="write the table into this page")
    add(
        "--from",
        dest="stored",
        type=Path,
        metavar="JSON",
        help="report a stored run, measure nothing",
    )
    add("--commit", help="what to name as the commit (default: asked of git)")
    add("--device", default="cuda", help="cpu tries the command out")
    add("--compile", nargs=3, metavar=("PEER", "H", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.command = command(sys.argv[1:])
    if options.device == "cuda" and not options.stored and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use.")
    return defaults(options)


def command(arguments: list[str]) -> str:
    """What was typed, without where the results go."""
    kept, skip = [], False
    for word in arguments:
        name, _, value = word.partition("=")
        if skip or name in ("--output", "--update", "--commit"):
            skip = not skip and not value
            continue
        kept.append(word)
    return " ".join(["python -m benchmarks.gpu", *kept])


def parse_layer(text: str) -> LayerSize:
    hidden, heads, dim, length = map(int, text.split("x"))
    return LayerSize(hidden, heads, dim, length)


def defaults(options: argparse.Namespace) -> argparse.Namespace:
    """What was not given, and the sizes as a list."""
    quick = options.quick
    if options.peers is None:
        options.peers = [name for name in registry.PEERS if not quick or name != "mesa_net"]
    if options.limit_seconds is None:
        options.limit_seconds = 75.0 if quick else 240.0
    if options.layer is None:
        options.layer = not quick
    found = options.sizes or (SHAPES[:2] if quick else SHAPES)
    widths = options.dims or ([128] if quick else [128, 64])
    options.sizes = [Size(b, t, h, dim) for dim in widths for b, t, h in found]
    return options
