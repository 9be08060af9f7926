"""One token a sequence on states in place, in a CUDA graph: `python -m benchmarks.decode --output DIR`.

    python -m benchmarks.decode --output DIR --model FOLDER   also on a trained model's states and keys

Checks every kernel against the float64 torch form, then times it. Writes decode.json with all repeats,
decode.md and decode.png.

The graph holds one step for each of a few layers, every one with states of its own, so that they come
from memory as in a model: a time is the graph's, the second-level cache emptied before it, over the
layers. The yardstick is a graph that copies as many bytes as the states have: it reads and writes what a
step must. Artificial states hold 512 tokens of unit SiLU keys with a mean under decays of exp(-1e-3) to
exp(-1e-1) a token, by head. With --model they have that model's heads and layers, and beside them stand
the states that its GKA layers have after --context tokens of a text that it was not trained on, each
sequence from another place, and the queries, keys, values and alpha of the token that comes next.

The steps that are timed write with a gate of 1e-3 and without decay, which costs the same and leaves the
states, and with them the adaptive solver's work, as they are ("moved" in decode.json is by how much H has
changed in the end, relatively); a model's own gates are in the checks alone.
"""

import argparse
import datetime
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks import decode_report
from benchmarks.contenders import NotAvailable
from benchmarks.decode_inputs import Artificial, Layer, Shape, Source
from benchmarks.decode_model import Trained, name_of
from benchmarks.gpu import commit, reason, versions
from benchmarks.numerics import relative
from benchmarks.output import own
from benchmarks.stopwatch import Call, Stopwatch
from torch import Tensor

from gka.data.files import write_text
from gka.errors import InputError
from gka.ops import fused_recurrent_gka_, why_unavailable

BATCHES, HEADS, DIM, CONTEXT = (1, 16, 64, 256), 16, 128, 512
TOLERANCE = 1e-2  # of o, bfloat16, in the relative 2-norm
SOLVES = {
    "chebyshev 10": {"solver": "chebyshev", "num_iter": 10},
    "chebyshev 30": {"solver": "chebyshev", "num_iter": 30},
    "adaptive 30": {"solver": "adaptive", "num_iter": 30},
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """A kernel with one solve and one storage of U."""

    backend: str
    solve: str
    stored: str

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.solve}, U {self.stored}"


def captured(call: Call, cuda: bool) -> Call:
    """The call as a CUDA graph, after a first run of its own."""
    if not cuda:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return partial(replay, graph, call)


def replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """Run `graph`. It reads and writes tensors that `call` alone keeps alive."""
    graph.replay()


class Bench:
    """One run: options, clock and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.perf_counter()
        self.device, self.watch = options.device, Stopwatch(options.device)
        card = (
            torch.cuda.get_device_name() if self.watch.cuda else "CPU, a trial: times mean nothing"
        )
        self.result: dict = {
            "command": options.command, "date": datetime.date.today().isoformat(),
            "commit": options.commit or commit(), "versions": versions(), "card": card, "sources": [],
        }  # fmt: skip

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:5.1f} s] {text}", flush=True)

    def run(self) -> dict:
        with torch.inference_mode():
            torch.manual_seed(0)
            for source in self.sources():
                self.source(source)
        self.result["seconds"] = time.perf_counter() - self.begin
        return self.result

    def sources(self) -> list[Source]:
        """Artificial states, of a trained model's heads and layers where one is given, and that model's."""
        if self.options.model is None:
            heads, dim = (HEADS, DIM) if self.watch.cuda else (2, 16)
            shape = Shape(heads, heads, heads, dim, dim)
            return [Artificial(shape, self.device, None if self.watch.cuda else 1)]
        self.say(f"{self.options.model} reads")
        trained = Trained(self.options)
        self.say(f"{trained.name}: {trained.shape}, {len(trained.read)} layers")
        return [Artificial(trained.shape, self.device, len(trained.read)), trained]

    def source(self, source: Source) -> None:
        """Check what can run there, and time it at every batch size."""
        part = {
            "source": source.name, "shape": str(source.shape), "about": source.about, "checks": {},
            "step": [],
        }  # fmt: skip
        self.result["sources"].append(part)
        contenders = self.check(source, part["checks"])
        for batch in self.options.batches:
            part["step"].append(self.step(source, contenders, batch))

    def check(self, source: Source, checks: dict) -> list[Contender]:
        """Every contender's o and states against float64, the worst of all layers; those that pass."""
        dims = (source.shape.key_dim, source.shape.value_dim)
        passed = []
        for contender in contenders(self.watch.cuda):
            refusal = why_unavailable(
                contender.backend, self.device, torch.bfloat16, dims=dims, mode="step"
            )
            try:
                if refusal is not None:
                    raise NotAvailable(f"not available: {refusal}")
                errors = self.errors(source, contender)
                ok = max(errors) < TOLERANCE
                told = ", ".join(f"{n} {e:.1e}" for n, e in zip("oHU", errors, strict=True))
            except Exception as error:
                ok, told = False, reason(error)
            checks[contender.name] = {"ok": ok, "errors": told}
            self.say(f"{source.name}, {contender.name}: {'' if ok else 'FAILED: '}{told}")
            if ok:
                passed.append(contender)
        return passed

    def errors(self, source: Source, contender: Contender) -> list[float]:
        """Relative errors of o, H and U where layers take their token as it is."""
        worst = [0.0, 0.0, 0.0]
        for layer in dict.fromkeys(source.layers(min(3, max(self.options.batches)))):
            h, u = layer.state
            stored = u.to(STORED[contender.stored])
            wide, options = (h.double(), stored.double()), layer.settings | SOLVES[contender.solve]
            exact = {name: None if x is None else x.double() for name, x in layer.token.items()}
            wanted = fused_recurrent_gka_(**exact, state=wide, backend="torch", **options)
            ours = (h.clone(), stored.clone())
            o = fused_recurrent_gka_(
                **layer.token, state=ours, backend=contender.backend, **options
            )
            found = [relative(a, b) for a, b in zip((o, *ours), (wanted, *wide), strict=True)]
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
        return worst

    def step(self, source: Source, contenders: list[Contender], batch: int) -> dict:
        """Times of the contenders and of the copies at one batch size."""
        layers = source.layers(batch)
        calls: dict[str, Call] = {}
        widths, pools = {}, {}
        for stored, dtype in STORED.items():
            pools[stored] = [
                (h.clone(), u.to(dtype, copy=True)) for h, u in (x.state for x in layers)
            ]
            size = sum(x.nbytes for x in pools[stored][0])
            origin, target = (
                torch.empty(size, dtype=torch.int8, device=self.device) for _ in range(2)
            )
            widths[stored] = 2 * size
            calls[f"copy, U {stored}"] = self.graph([self.copy(origin, target)] * len(layers))
            for contender in contenders:
                if contender.stored == stored:
                    pairs = zip(layers, pools[stored], strict=True)
                    steps = [self.call(contender, *pair) for pair in pairs]
                    calls[contender.name] = self.graph(steps)
        times = self.watch.interleaved(calls, self.options.seconds)
        rows = {}
        for name, found in times.items():
            width = widths[name.rsplit(" ", 1)[1]]
            rows[name] = summary([[x / len(layers) for x in part] for part in found.device], width)
            told = f"{1e3 * rows[name]['median']:.1f} us, {rows[name]['gbps']:.0f} GB/s"
            self.say(f"{source.name}, batch {batch}, {name}: {told}")
        each = dict.fromkeys(layers)
        steps = torch.stack([layer.steps(30).double().mean() for layer in each])
        moved = [
            relative(h, layer.state[0])
            for pool in pools.values()
            for (h, _), layer in zip(pool, layers, strict=True)
        ]
        return {
            "batch": batch, "layers": len(layers), "rows": rows, "moved": max(moved),
            "adaptive_steps": float(steps.mean()), "adaptive_steps_by_layer": steps.tolist(),
        }  # fmt: skip

    def graph(self, calls: list[Call]) -> Call:
        return captured(lambda: [call() for call in calls], self.watch.cuda)

    @staticmethod
    def copy(source: Tensor, target: Tensor) -> Call:
        return lambda: target.copy_(source)

    @staticmethod
    def call(contender: Contender, layer: Layer, pool: tuple[Tensor, Tensor]) -> Call:
        token, backend = layer.still(), contender.backend
        options = layer.settings | SOLVES[contender.solve]
        return lambda: fused_recurrent_gka_(**token, state=pool, backend=backend, **options)


def contenders(cuda: bool) -> list[Contender]:
    """All that there are on a device."""
    backends = ("hopper", "triton") if cuda else ("torch",)
    return [
        Contender(backend, solve, stored)
        for backend in backends for solve in SOLVES for stored in STORED
    ]  # fmt: skip


def summary(ms: list[list[float]], width: int) -> dict:
    """Of a step's times by round: all of them, median and range, and the speed of `width` bytes."""
    flat = sorted(x for part in ms for x in part)
    median = flat[len(flat) // 2]
    return {
        "ms": ms, "median": median, "min": flat[0], "max": flat[-1], "bytes": width,
        "gbps": width / median / 1e6,
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--model", type=Path, help="folder of a trained model with GKA layers, or of its run")
    add(
        "--text", type=Path, nargs="+", default=[],
        help="files or folders that it reads (the held-out part of Python's standard library)",
    )  # fmt: skip
    add("--context", type=int, default=CONTEXT, help=f"tokens a sequence reads ({CONTEXT})")
    add("--device", default="cuda", help="cpu: a trial of the command, tiny")
    add("--batches", type=int, nargs="+", default=list(BATCHES))
    add("--seconds", type=float, default=0.25, help="for each row and batch size")
    add("--commit", help="what the tables name, where there is no repository")
    options = parser.parse_args(arguments)
    if options.context < 1 or min(options.batches) < 1:
        parser.error("--context and --batches must be at least 1")
    if options.model is None and (options.text or options.context != CONTEXT):
        parser.error("--text and --context are what a --model reads; give one")
    options.command = command(options)
    return options


def command(options: argparse.Namespace) -> str:
    """What was typed, without where things lie."""
    words = ["python -m benchmarks.decode"]
    if options.model is not None:
        words += ["--model", name_of(options.model)]
    if options.text:
        words += ["--text", *(path.name for path in options.text)]
    if options.context != CONTEXT:
        words += ["--context", str(options.context)]
    if options.batches != list(BATCHES):
        words += ["--batches", *map(str, options.batches)]
    return " ".join(words)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    own(options.output)
    try:
        result = Bench(options).run()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    write_text(options.output / "decode.json", json.dumps(result, indent=1) + "\n")
    write_text(options.output / "decode.md", decode_report.markdown(result))
    print(decode_report.markdown(result))
    if not decode_report.plot(result, options.output / "decode.png"):
        print("no plot: matplotlib is not installed")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
