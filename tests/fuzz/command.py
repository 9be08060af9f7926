"""`python -m tests.fuzz`: 10,000 random calls compared with float64, 800 wrong ones that must be refused.

Every call is drawn from the seed and its number alone: `--only NUMBER` runs one again.
"""

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from fuzz.compare import Verdict, judge_call
from fuzz.draw import draw_call
from fuzz.invalid import Case, attempt, wrong_ops
from fuzz.invalid_layers import wrong_configurations, wrong_layers
from fuzz.layers import draw_layer, judge_layer
from fuzz.report import Report

EVERY_TRITON = 50  # one call of so many runs in Triton's interpreter, which takes half a second
EVERY_LAYER = 8
PROGRESS = 10.0  # seconds


def judge_number(seed: int, index: int) -> tuple[str, dict[str, str], Verdict]:
    """(op, traits, verdict) of the valid call of that number."""
    if index % EVERY_TRITON == 0 and _has_triton():
        call = draw_call(seed, index, triton=True)
    elif index % EVERY_LAYER == 1:
        layer = draw_layer(seed, index)
        return layer.op, layer.traits, judge_layer(layer, index)
    else:
        call = draw_call(seed, index)
    return call.op, call.traits, judge_call(call, index)


def _has_triton() -> bool:
    from gka.ops import why_unavailable

    return why_unavailable("triton", "cpu", torch.float32, dims=(16, 16)) is None


def draw_invalid(seed: int, count: int) -> list[Case]:
    """`count` wrong calls: all there are before any comes twice."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        torch.manual_seed(seed + len(drawn))
        cases = wrong_ops() + wrong_layers() + wrong_configurations()
        rng.shuffle(cases)
        drawn += cases
    return drawn[:count]


def run(
    seed: int, valid: int, invalid: int, minutes: float, say: Callable[[str], None] = print
) -> Report:
    """Run the calls, or as many as there is time for."""
    report, start, told = Report(seed), time.monotonic(), time.monotonic()

    def in_time() -> bool:
        nonlocal told
        now = time.monotonic()
        report.seconds = now - start
        if now - told > PROGRESS:
            told = now
            say(report.line())
        return report.seconds < 60 * minutes

    for index, (what, argument, call) in enumerate(draw_invalid(seed, invalid)):
        if not in_time():
            break
        report.add_invalid(index, attempt(what, argument, call))
    for index in range(valid):
        if not in_time():
            break
        report.add_valid(index, *judge_number(seed, index))
    in_time()
    return report


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--valid", type=int, default=10_000, help="calls to compare (10,000)")
    parser.add_argument("--invalid", type=int, default=800, help="calls to be refused (800)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long (60)")
    parser.add_argument(
        "--only", type=int, help="run the valid call of this number alone, in detail"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz/fuzz.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if every call was right, or refused where it had to be; 1 if not."""
    given = options(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.only is not None:
        op, traits, verdict = judge_number(given.seed, given.only)
        print(op, traits, verdict.status, verdict.message)
        for found in verdict.findings:
            print(
                f"  {found.name}: {found.error:.2g} tolerances, relative {found.relative:.1e}, {found.dtype}"
            )
        return int(verdict.status not in ("right", "border"))
    report = run(
        given.seed, given.valid, given.invalid, given.minutes, lambda x: print(x, file=sys.stderr)
    )
    report.write(given.output)
    print(report.show())
    print(f"All of it: {given.output}")
    return int(report.failed)
