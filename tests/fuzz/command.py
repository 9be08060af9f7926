"""`python -m tests.fuzz`: 10,000 random calls compared with float64, 800 wrong ones that must be refused.

Every call is drawn from the seed and its number alone: `--only NUMBER` runs one again.
"""

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
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


def judged(
    seed: int, valid: int, workers: int
) -> Iterator[tuple[int, tuple[str, dict[str, str], Verdict]]]:
    """(number, what `judge_number` returns) of every valid call, from `workers` processes, in any order."""
    if workers == 1:
        yield from ((index, judge_number(seed, index)) for index in range(valid))
        return
    with get_context("spawn").Pool(workers, initializer=_be_quiet) as pool:
        yield from pool.imap_unordered(_numbered, ((seed, i) for i in range(valid)), chunksize=10)


def _numbered(given: tuple[int, int]) -> tuple[int, tuple[str, dict[str, str], Verdict]]:
    return given[1], judge_number(*given)


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def run(
    seed: int,
    valid: int,
    invalid: int,
    minutes: float,
    say: Callable[[Report], None] = lambda report: print(report.line()),
    workers: int = 1,
) -> Report:
    """Run the calls, or as many as there is time for; `say` gets the report every ten seconds."""
    report, start, told = Report(seed), time.monotonic(), time.monotonic()

    def in_time() -> bool:
        nonlocal told
        now = time.monotonic()
        report.seconds = now - start
        if now - told > PROGRESS:
            told = now
            say(report)
        return report.seconds < 60 * minutes

    for index, (what, argument, call) in enumerate(draw_invalid(seed, invalid)):
        if not in_time():
            break
        report.add_invalid(index, attempt(what, argument, call))
    for index, verdict in judged(seed, valid, workers):
        report.add_valid(index, *verdict)
        if not in_time():
            break
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
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz/fuzz.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if every call was right, or refused where it had to be; 1 if not."""
    given = options(arguments)
    _be_quiet()
    if given.only is not None:
        op, traits, verdict = judge_number(given.seed, given.only)
        print(op, traits, verdict.status, verdict.message)
        for found in verdict.findings:
            print(
                f"  {found.name}: {found.error:.2g} tolerances, relative {found.relative:.1e}, {found.dtype}"
            )
        return int(verdict.status not in ("right", "border"))

    def say(report: Report) -> None:
        print(report.line(), file=sys.stderr)
        report.write(given.output)  # an interrupted run keeps its faults by name

    report = run(given.seed, given.valid, given.invalid, given.minutes, say, given.workers)
    report.write(given.output)
    print(report.show())
    print(f"All of it: {given.output}")
    return int(report.failed)
