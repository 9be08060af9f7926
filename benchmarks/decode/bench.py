"""Decode steps of one token per sequence in a CUDA graph: `python -m benchmarks.run decode --output DIR`.

    python -m benchmarks.run decode --output DIR --model FOLDER   also on a trained model's states and keys

Checks every kernel against the torch backend in float64, then times it. Writes decode.json with all repeats,
decode.md and decode.png.

A graph has one step for each of several layers with separate states, which come from memory as in a model.
The time of a step is the graph's time, after emptying the second-level cache, divided by the number of
layers. The reference is a graph that copies as many bytes as the states have, since a step must read and
write them. Artificial states are those after 512 tokens of unit SiLU keys with a mean, with decays of
exp(-1e-3) to exp(-1e-1) by head. With --model they have that model's heads and layers, and the model's own
states are measured too: each sequence reads --context tokens from another place of a held-out text.
Queries, keys, values and alpha are then those of the next token.

Timed steps have write gate 1e-3 and no decay. This costs the same and hardly changes the states, so the
adaptive solver's work stays the same ("moved" in decode.json is the relative change of H at the end). Only
the checks use the model's gates.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benchmarks import results
from benchmarks.decode.kernels import SOLVES, STORED, DecodeKernel, decode_kernels
from benchmarks.decode.states import Artificial, Layer, Shape, Source, Trained
from benchmarks.registry import NotAvailable, reason
from torch import Tensor

from gka.experiments.ledger import markdown_table, refusing
from gka.experiments.numerics import relative
from gka.experiments.stopwatch import Call, captured
from gka.ops import fused_recurrent_gka_, why_unavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES, HEADS, DIM, CONTEXT = (1, 16, 64, 256), 16, 128, 512
TOLERANCE = 1e-2  # relative 2-norm error of o (bfloat16), H and U


class Bench(results.Run):
    """One run of `python -m benchmarks.run decode`."""

    def run(self) -> dict[str, Any]:
        """Check and time every source; decode.json is rewritten after each check and batch size."""
        self.found["sources"] = []
        with torch.inference_mode():
            torch.manual_seed(0)
            for source in self.sources():
                self.source(source)
        self.note(seconds=self.elapsed)
        return self.found

    def sources(self) -> list[Source]:
        """Artificial states; with --model in that model's shape, followed by the model's states."""
        if self.options.model is None:
            heads, dim = (HEADS, DIM) if self.watch.cuda else (2, 16)
            shape = Shape(heads, heads, heads, dim, dim)
            return [Artificial(shape, self.device, None if self.watch.cuda else 1)]
        self.say(f"{self.options.model} reads")
        trained = Trained(self.options)
        self.say(f"{trained.name}: {trained.shape}, {len(trained.read)} layers")
        return [Artificial(trained.shape, self.device, len(trained.read)), trained]

    def source(self, source: Source) -> None:
        """Check all kernels, and time those that pass at every batch size."""
        part = {
            "source": source.name, "shape": str(source.shape), "about": source.about, "checks": {},
            "step": [],
        }  # fmt: skip
        self.found["sources"].append(part)
        kernels = self.check(source, part["checks"])
        for batch in self.options.batches:
            part["step"].append(self.step(source, kernels, batch))
            self.note()

    def check(self, source: Source, checks: dict) -> list[DecodeKernel]:
        """Check every kernel's o, H and U against float64, worst of all layers; return those that pass."""
        dims = (source.shape.key_dim, source.shape.value_dim)
        passed = []
        for kernel in decode_kernels(self.watch.cuda):
            refusal = why_unavailable(
                kernel.backend, self.device, torch.bfloat16, dims=dims, mode="step"
            )
            try:
                if refusal is not None:
                    raise NotAvailable(f"not available: {refusal}")
                errors = self.errors(source, kernel)
                ok = max(errors) < TOLERANCE
                told = ", ".join(f"{n} {e:.1e}" for n, e in zip("oHU", errors, strict=True))
            except Exception as error:
                ok, told = False, reason(error)
            checks[kernel.name] = {"ok": ok, "errors": told}
            self.note()
            self.say(f"{source.name}, {kernel.name}: {'' if ok else 'FAILED: '}{told}")
            if ok:
                passed.append(kernel)
        return passed

    def errors(self, source: Source, kernel: DecodeKernel) -> list[float]:
        """Relative errors of o, H and U with the layers' unchanged tokens."""
        worst = [0.0, 0.0, 0.0]
        for layer in dict.fromkeys(source.layers(min(3, max(self.options.batches)))):
            h, u = layer.state
            stored = u.to(STORED[kernel.stored])
            wide, options = (h.double(), stored.double()), layer.settings | SOLVES[kernel.solve]
            exact = {name: None if x is None else x.double() for name, x in layer.token.items()}
            wanted = fused_recurrent_gka_(**exact, state=wide, backend="torch", **options)
            ours = (h.clone(), stored.clone())
            o = fused_recurrent_gka_(**layer.token, state=ours, backend=kernel.backend, **options)
            found = [relative(a, b) for a, b in zip((o, *ours), (wanted, *wide), strict=True)]
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
        return worst

    def step(self, source: Source, kernels: list[DecodeKernel], batch: int) -> dict:
        """Times of the kernels and of the copies at one batch size."""
        layers = source.layers(batch)
        pools = {
            stored: [(h.clone(), u.to(dtype, copy=True)) for h, u in (x.state for x in layers)]
            for stored, dtype in STORED.items()
        }
        # A step reads and writes its states.
        widths = {stored: 2 * sum(x.nbytes for x in pool[0]) for stored, pool in pools.items()}
        times = self.watch.interleaved(self.graphs(layers, kernels, pools), self.options.seconds)
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

    def graphs(
        self, layers: list[Layer], kernels: list[DecodeKernel], pools: dict[str, list]
    ) -> dict[str, Call]:
        """Graphs of one step of all layers for every kernel, and of a copy for each storage dtype of U."""
        calls: dict[str, Call] = {}
        for stored, pool in pools.items():
            size = sum(x.nbytes for x in pool[0])
            origin, target = (
                torch.empty(size, dtype=torch.int8, device=self.device) for _ in range(2)
            )
            calls[f"copy, U {stored}"] = self.graph([self.copy(origin, target)] * len(layers))
            for kernel in kernels:
                if kernel.stored == stored:
                    pairs = zip(layers, pool, strict=True)
                    calls[kernel.name] = self.graph([self.call(kernel, *pair) for pair in pairs])
        return calls

    def graph(self, calls: list[Call]) -> Call:
        return captured(lambda: [call() for call in calls], self.watch.cuda)

    @staticmethod
    def copy(source: Tensor, target: Tensor) -> Call:
        return lambda: target.copy_(source)

    @staticmethod
    def call(kernel: DecodeKernel, layer: Layer, pool: tuple[Tensor, Tensor]) -> Call:
        token, backend = layer.still(), kernel.backend
        options = layer.settings | SOLVES[kernel.solve]
        return lambda: fused_recurrent_gka_(**token, state=pool, backend=backend, **options)


def summary(ms: list[list[float]], width: int) -> dict:
    """A step's times by round, their median and range, and the speed at which it moves `width` bytes."""
    flat = sorted(x for part in ms for x in part)
    median = flat[len(flat) // 2]
    return {
        "ms": ms, "median": median, "min": flat[0], "max": flat[-1], "bytes": width,
        "gbps": width / median / 1e6,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Time of a step in us (minimum..maximum) and GB/s; a table for each source."""
    head = (
        f"{result['card']}, one token a sequence.\n"
        f"`{result['command']}`, {result['date']}, commit {result['commit']}."
    )
    return "\n\n".join([head, *("\n".join(table(part)) for part in result["sources"])]) + "\n"


def table(part: dict[str, Any]) -> Iterator[str]:
    """The lines of one source."""
    yield title(part)
    yield ""
    head = ["kernel, solve, storage of U"]
    for found in part["step"]:
        head += [f"batch {found['batch']}: us", "GB/s"]
    rows = []
    for name in part["step"][0]["rows"] if part["step"] else ():
        rows.append([name])
        for found in part["step"]:
            row = found["rows"][name]
            low, high = 1e3 * row["min"], 1e3 * row["max"]
            rows[-1] += [f"{1e3 * row['median']:.1f} ({low:.1f}..{high:.1f})", f"{row['gbps']:.0f}"]
    rows.append(["steps of adaptive 30, mean"])
    for found in part["step"]:
        rows[-1] += [f"{found['adaptive_steps']:.1f}", ""]
    yield markdown_table(head, rows)
    failed = [f"- not timed: {n}: {c['errors']}" for n, c in part["checks"].items() if not c["ok"]]
    if failed:
        yield "\n" + "\n".join(failed)


def title(part: dict[str, Any]) -> str:
    """A source in words."""
    about = part["about"]
    if not about:
        counts = sorted({found["layers"] for found in part["step"]})
        return (
            f"Artificial states and keys: {part['shape']}, layers: {', '.join(map(str, counts))}."
        )
    return (
        f"Trained model {part['source']}, {about['parameters'] / 1e6:.1f} M parameters, "
        f"{about['gka_layers']} of {about['layers']} layers GKA: {part['shape']}, ridge_ratio "
        f"{about['ridge_ratio']:g}. States after {about['context']} tokens ({about['text']}; a sequence "
        f"every {about['tokens_apart']} tokens)."
    )


def draw(result: dict[str, Any], figure: "Figure") -> None:
    """Draw the time of a step over the batch size, a row for each source."""
    parts = result["sources"]
    figure.set_size_inches(11, 4.5 * len(parts))
    axes = figure.subplots(len(parts), 2, sharey=True, squeeze=False)
    for row, part in zip(axes, parts, strict=True):
        draw_source(row, part)
    figure.suptitle(f"{result['card']}: one token a sequence, {parts[0]['shape']}")


def draw_source(axes: Any, part: dict[str, Any]) -> None:
    """Draw a source's times, a panel for each storage dtype of U."""
    batches = [found["batch"] for found in part["step"]]
    for axis, stored in zip(axes, STORED, strict=True):
        for name in part["step"][0]["rows"]:
            if name.endswith(f"U {stored}"):
                medians = [1e3 * found["rows"][name]["median"] for found in part["step"]]
                style = "k--" if name.startswith("copy") else "o-"
                axis.loglog(batches, medians, style, label=name.rsplit(",", 1)[0], markersize=4)
        words = f"{part['source']}, U stored as {stored}"
        axis.set(xlabel="sequences", title=words, xticks=batches)
        axis.set_xticklabels(map(str, batches))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("us a step")
    axes[0].legend(fontsize=8)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser("decode", __doc__)
    add = parser.add_argument
    add("--model", type=Path, help="folder of a trained model with GKA layers, or of its run")
    add(
        "--text", type=Path, nargs="+", default=[],
        help="files or folders that it reads (the held-out part of Python's standard library)",
    )  # fmt: skip
    add("--context", type=int, default=CONTEXT, help=f"tokens a sequence reads ({CONTEXT})")
    add("--batches", type=int, nargs="+", default=list(BATCHES))
    add("--seconds", type=float, default=0.25, help="for each row and batch size")
    options = results.parse(parser, arguments, folders=("--model", "--text"))
    if options.context < 1 or min(options.batches) < 1:
        parser.error("--context and --batches must be at least 1")
    if options.model is None and (options.text or options.context != CONTEXT):
        parser.error("--text and --context are what a --model reads; give one")
    return options


def main(arguments: list[str] | None = None) -> None:
    bench = Bench("decode", parse(arguments))
    with refusing():
        found = bench.run()
    print(markdown(found))
    bench.report(markdown(found), lambda figure: draw(found, figure))
