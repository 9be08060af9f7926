"""The first training step of a model, in one process after another that share a cache on disk:
`python -m benchmarks.run first-step --size 395m --output DIR`.

The first process begins with an empty cache (DIR/cache); later ones read what it left: graphs of
torch.compile, Triton's kernels, and the machine code of the CUDA C++ kernels. Each compiles as `gka train`
does (--how as its --compile), takes three steps, and tells their seconds and what was compiled or read. Which
parts of the compiler took the longest is in DIR/first-step.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks import results
from benchmarks.model import step
from benchmarks.model.sizes import MIXERS, SIZES
from benchmarks.model.step import Cell

from gka.experiments.ledger import Ledger
from gka.experiments.stopwatch import Stopwatch
from gka.kernels import cubins
from gka.storage import read_json, write_json
from gka.training import compilation

STEPS, LONGEST = 3, 8
# a cache elsewhere would be read instead
ELSEWHERE = ("TORCHINDUCTOR_CACHE_DIR", "GKA_COMPILE_CACHE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")


def measure(size: str, mixer: str, how: str, device: str) -> dict[str, Any]:
    """Seconds of the first steps of this process, and what they compiled and read."""
    cell = Cell(size, mixer, "off", "none", STEPS, 0, device)
    began, watch = time.perf_counter(), Stopwatch(device)
    model = step.build(cell, SIZES[size])
    take = step.make_step(cell, SIZES[size], model)
    watch.wait()
    built = time.perf_counter() - began
    with compilation.compiled([model], how):
        seconds = [step.seconds(take, watch) for _ in range(STEPS)]
    return {
        "build_s": built, "step_s": seconds, "graphs": compilation.graphs(),
        "cubins": dict(cubins.COUNTS), "parts": slowest_parts(),
    }  # fmt: skip


def slowest_parts() -> dict[str, float]:
    """Seconds of the parts of torch.compile that took the longest; one may be within another."""
    from torch._dynamo.utils import compilation_time_metrics

    spent = {name: sum(times) for name, times in compilation_time_metrics.items()}
    return dict(sorted(spent.items(), key=lambda part: -part[1])[:LONGEST])


def in_process(options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """`measure` in a process of its own on that cache."""
    file = options.output / "process.json"
    env = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    env |= {"GKA_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    given = [options.size, options.mixer, options.how, options.device]
    words = [sys.executable, "-m", "benchmarks.run", "first-step", "--process", json.dumps(given)]
    began = time.perf_counter()
    subprocess.run([*words, "--output", str(file)], env=env, check=True)
    found = read_json(file) | {"process_s": time.perf_counter() - began}
    file.unlink()
    return found


def line(number: int, found: dict[str, Any]) -> str:
    """A process in a line."""
    steps = ", ".join(f"{seconds:.2f}" for seconds in found["step_s"])
    kernels = ", ".join(f"{count} {what}" for what, count in found["cubins"].items()) or "none"
    graphs = found["graphs"]
    return (
        f"process {number}: steps {steps} s (model built in {found['build_s']:.1f} s); graphs: "
        f"{graphs['compiled']} compiled, {graphs['read']} read; CUDA C++ kernels: {kernels}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    made = results.parser("first-step", __doc__)
    add = made.add_argument
    add("--size", choices=SIZES, default="395m", help="(395m)")
    add("--mixer", choices=MIXERS, default="gka", help="(gka)")
    add("--how", choices=("layers", "model", "off"), default="layers", help="(layers)")
    add("--processes", type=int, default=2, help="one after the other (2)")
    add("--process", type=json.loads, help=argparse.SUPPRESS)
    return results.parse(made, arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.process:
        write_json(options.output, measure(*options.process))
        return
    cache = options.output / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    ledger = Ledger(options.output, "first-step")
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    ledger.found |= {
        "command": options.command, "card": card, "versions": results.versions(),
        "commit": options.commit or results.commit(), "processes": [],
    }  # fmt: skip
    for number in range(1, options.processes + 1):
        ledger.found["processes"].append(in_process(options, cache))
        ledger.note()
        ledger.say(line(number, ledger.found["processes"][-1]))
