"""The op and the layer against their peers on this GPU: `python -m benchmarks.run op --output DIR`.

All compared functions run in this process, interleaved. Writes op.json with all repeats, op.md and op.png.
With --profile, the kernels of one training step of the op and of the layers then go to profile.txt.

Times are from CUDA events around one call, without waiting for earlier calls, after emptying the second-level
cache. Forward runs without gradients; forward + backward is torch.autograd.grad with a fixed random
gradient of the output. Peak memory is that of forward + backward, with the function's inputs and the
gradient of its output.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks import registry, results
from benchmarks.op import profile, report
from benchmarks.op.compare import TRAINED, Comparison
from benchmarks.registry import LayerSize, Size

from gka.experiments.ledger import own
from gka.ops.backends import known_backends
from gka.storage import read_json

SHAPES = ((1, 8192, 16), (4, 8192, 8), (8, 2048, 16), (1, 131072, 16))
LAYER = LayerSize(hidden=2048, heads=16, dim=128, length=8192)
TUNING_SHARE = (
    0.5  # fraction of the time limit for compiling the peers' kernels, before any measurement
)


def run(bench: Comparison) -> dict[str, Any]:
    """Measure everything; mesa_net last, because its kernels take longest to compile."""
    options = bench.options
    ours = [registry.ours(solver, bench.backend) for solver in registry.SOLVERS]
    peers = [registry.PEERS[name] for name in options.peers]
    early = [peer for peer in peers if peer.name != "mesa_net"]
    compile_peers(bench, [*{(size.heads, size.dim): None for size in options.sizes}])
    for size in options.sizes:
        bench.group(size, [*ours, *early])
    if options.layer:
        bench.layers()
    if len(early) < len(peers):
        base = [peer for peer in early if peer.name in registry.BASELINES]
        for size in options.sizes:
            bench.group(size, [*base, registry.PEERS["mesa_net"]], repeated=True)
    if options.profile:
        profile.profile(bench)
    bench.say("done")
    bench.note(seconds=bench.elapsed)
    return bench.found


def compile_peers(bench: Comparison, pairs: list[tuple[int, int]]) -> None:
    """Compile the peers' kernels in parallel processes, one per peer, number of heads and head dim.

    They keep only compiled kernels, on disk. This process tunes launch configurations later, alone.
    """
    there = {x for x in registry.PACKAGES.values() if importlib.util.find_spec(x) is not None}
    names = [name for name in bench.options.peers if registry.PACKAGES.get(name) in there]
    if not bench.watch.cuda or not names:
        return
    jobs = [(name, heads, dim) for name in names for heads, dim in pairs]
    jobs += [("layer", LAYER.heads, LAYER.dim)] if bench.options.layer and "fla" in there else []
    bench.say(f"compiling the peers' kernels, {len(jobs)} processes")
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.run", "op", "--compile", *map(str, job)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for job in jobs
    ]  # fmt: skip
    end = time.perf_counter() + TUNING_SHARE * bench.left
    for job, process in zip(jobs, running, strict=True):
        try:
            process.wait(max(0.1, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            bench.say(f"{job}: still compiling, goes on in this process")


def compile_peer(name: str, heads: int, dim: int) -> None:
    """Compile one peer's kernels; runs in the processes of `compile_peers`."""
    if name == "layer":
        size = LayerSize(LAYER.hidden, heads, dim, 1024)
        layer = registry.peer_layer(size).to("cuda", torch.bfloat16)
        calls = registry.layer_passes(layer, size, "cuda")
    else:
        peer = registry.PEERS[name]
        inputs = registry.make_inputs(Size(1, 1024, heads, dim), "silu", "cuda")
        calls = registry.passes(peer.load(), inputs, peer.leaves)
    for call in calls.values():
        call()
    torch.cuda.synchronize()


def shapes(text: str) -> list[tuple[int, int, int]]:
    """Parse "BxTxH,BxTxH,..."."""
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


def layer_size(text: str) -> LayerSize:
    hidden, heads, dim, length = map(int, text.split("x"))
    return LayerSize(hidden, heads, dim, length)


def peers(text: str) -> list[str]:
    """Parse names of peers, or "none"."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in registry.PEERS:
            known = ", ".join([*registry.PEERS, "none"])
            raise argparse.ArgumentTypeError(f"there are {known}; got {name!r}")
    return names


def dims(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"dims are numbers, as in 64,128; got {text!r}") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line, with defaults that depend on other options."""
    parser = results.parser("op", __doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=0.3, help="time to spend on one measurement (0.3)")
    add("--sizes", type=shapes, help="BxTxH,... (default: the four of docs/performance.md)")
    add("--dims", type=dims, help="K = V (128,64)")
    add("--quick", action="store_true", help="two sizes, D = 128, no layer, no mesa_net")
    add("--limit-seconds", type=float, help="start no function after this time (240; --quick: 75)")
    add("--peers", type=peers, help=f"some of {','.join(registry.PEERS)}, or none (all)")
    add("--backend", choices=[b for b in known_backends() if b != "reference"], default="auto")
    add("--keys", choices=["silu-mean", "silu", "gaussian", TRAINED], default="silu-mean",
        help="trained: q, k, v and gates of --model's layers, at their K = V alone")  # fmt: skip
    run = Path("runs") / "bench-heads" / "run"
    add("--model", type=Path, default=run, help=f"a finished run of `gka train` ({run})")
    add("--layer", action=argparse.BooleanOptionalAction, help="the layers too")
    add("--layer-size", help=argparse.SUPPRESS, default=LAYER, type=layer_size)
    add("--profile", action="store_true", help="the kernels of one training step, at the end")
    add("--update", type=Path, metavar="PAGE", help="write the table into this page")
    stored = "report a stored run, measure nothing"
    add("--from", dest="stored", type=Path, metavar="JSON", help=stored)
    add("--compile", nargs=3, metavar=("PEER", "H", "D"), help=argparse.SUPPRESS)
    options = results.parse(parser, arguments, folders=("--model",))
    if options.device == "cuda" and not options.stored and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use.")
    if options.keys != TRAINED and options.model != run:
        parser.error("--model is what --keys trained reads; give both")
    return defaults(options)


def defaults(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in options that were not given, and make the list of sizes."""
    quick = options.quick
    if options.peers is None:
        options.peers = [name for name in registry.PEERS if not quick or name != "mesa_net"]
    if options.limit_seconds is None:
        options.limit_seconds = 75.0 if quick else 240.0
    if options.layer is None:
        options.layer = not quick
    found = options.sizes or (SHAPES[:2] if quick else SHAPES)
    widths = options.dims or ([128] if quick or options.keys == TRAINED else [128, 64])
    options.sizes = [Size(b, t, h, dim) for dim in widths for b, t, h in found]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.compile:
        name, heads, dim = options.compile
        compile_peer(name, int(heads), int(dim))
        return
    own(options.output)
    stored = options.stored
    found = run(Comparison(options)) if stored is None else read_json(stored)
    report.write(found, options.output)
    if options.update:
        report.update(options.update, found)
