"""One token a sequence on states in place, in a CUDA graph: `python -m benchmarks.decode --output DIR`.

Checks every kernel against the float64 torch form, then times it. Writes decode.json with all repeats,
decode.md and decode.png.

The graph holds one step for each of a few layers, every one with states of its own, so that they come
from memory as in a model: a time is the graph's, the second-level cache emptied before it, over the
layers. The yardstick is a graph that copies as many bytes as the states have: it reads and writes what a
step must. States hold 512 tokens of unit SiLU keys with a mean under decays of exp(-1e-3) to exp(-1e-1) a
token, by head. The steps that are timed write with a gate of 1e-3 and without decay, which costs the same
and leaves the states, and with them the adaptive solver's work, as they are.
"""

import argparse
import datetime
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks.gpu import commit, reason, versions
from benchmarks.numerics import relative
from benchmarks.stopwatch import Call, Stopwatch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.data.files import write_text as write
from gka.ops import available_backends, fused_recurrent_gka_

BATCHES, HEADS, DIM, HISTORY = (1, 16, 64, 256), 16, 128, 512
GRAPH_BYTES, MOST_LAYERS = 1 << 29, 24
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


def unit_keys(*shape: int, device: str) -> Tensor:
    return normalize(silu(torch.randn(*shape, device=device) + 0.5), dim=-1)


def states(batch: int, heads: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """H and U [B,H,K,K] after HISTORY tokens."""
    h, u = (torch.empty(batch, heads, dim, dim, device=device) for _ in range(2))
    rate = torch.logspace(-3, -1, heads, device=device)
    weight = torch.exp(-rate[:, None] * torch.arange(HISTORY, device=device)).unsqueeze(-1)
    for b in range(batch):
        k = unit_keys(heads, HISTORY, dim, device=device)
        v = torch.randn(heads, HISTORY, dim, device=device)
        h[b], u[b] = (k * weight).mT @ k, (k * weight).mT @ v
    return (h + h.mT) / 2, u


def tokens(batch: int, heads: int, dim: int, device: str) -> dict[str, Tensor]:
    """One token a sequence; the write gate is 1e-3."""
    q, k = (unit_keys(batch, 1, heads, dim, device=device).bfloat16() for _ in range(2))
    v = torch.randn(batch, 1, heads, dim, device=device).bfloat16()
    zero = torch.zeros(batch, 1, heads, device=device)
    gates = {"g": zero, "gk": zero, "alpha": torch.rand_like(zero), "beta": zero + 1e-3}
    return {"q": q, "k": k, "v": v, **gates}


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
        cuda = self.watch.cuda
        self.heads, self.dim = (HEADS, DIM) if cuda else (2, 16)
        found = available_backends(self.device, torch.bfloat16, dims=(DIM, DIM), mode="step")
        backends = [name for name in found if name in ("hopper", "triton")] if cuda else ["torch"]
        self.contenders = [
            Contender(backend, solve, stored)
            for backend in backends for solve in SOLVES for stored in STORED
        ]  # fmt: skip
        card = torch.cuda.get_device_name() if cuda else "CPU, a trial: these times mean nothing"
        self.result: dict = {
            "command": options.command, "date": datetime.date.today().isoformat(),
            "commit": options.commit or commit(), "versions": versions(), "card": card,
            "heads": self.heads, "dim": self.dim, "checks": {}, "step": [],
        }  # fmt: skip

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:5.1f} s] {text}", flush=True)

    def run(self) -> dict:
        with torch.inference_mode():
            torch.manual_seed(0)
            self.check()
            for batch in self.options.batches:
                self.step(batch)
        self.result["seconds"] = time.perf_counter() - self.begin
        return self.result

    def check(self) -> None:
        """Every contender's o and states against float64; those that fail are not timed."""
        size = (3, self.heads, self.dim, self.device)
        given, (h, u) = tokens(*size), states(*size)
        gates = {"g": given["g"] - 0.05, "gk": given["gk"] - 0.1, "beta": given["beta"] + 0.9}
        given |= gates
        passed = []
        for contender in self.contenders:
            stored = u.to(STORED[contender.stored])
            wide, options = (h.double(), stored.double()), SOLVES[contender.solve]
            exact = {name: x.double() for name, x in given.items()}
            wanted = fused_recurrent_gka_(**exact, state=wide, backend="torch", **options)
            ours = (h.clone(), stored)
            try:
                o = fused_recurrent_gka_(**given, state=ours, backend=contender.backend, **options)
                errors = [relative(a, b) for a, b in zip((o, *ours), (wanted, *wide), strict=True)]
                ok = max(errors) < TOLERANCE
                told = ", ".join(f"{n} {e:.1e}" for n, e in zip("oHU", errors, strict=True))
            except Exception as error:
                ok, told = False, reason(error)
            self.result["checks"][contender.name] = {"ok": ok, "errors": told}
            self.say(f"{contender.name}: {'' if ok else 'FAILED: '}{told}")
            if ok:
                passed.append(contender)
        self.contenders = passed

    def step(self, batch: int) -> None:
        """Times of all contenders and of the copies at one batch size."""
        base = states(batch, self.heads, self.dim, self.device)
        given = tokens(batch, self.heads, self.dim, self.device)
        size = sum(x.nbytes for x in base)
        layers = max(1, min(MOST_LAYERS, math.ceil(GRAPH_BYTES / size))) if self.watch.cuda else 1
        calls: dict[str, Call] = {}
        widths = {}
        for stored, dtype in STORED.items():
            pools = [(base[0].clone(), base[1].to(dtype, copy=True)) for _ in range(layers)]
            source, target = (
                torch.empty(sum(x.nbytes for x in pools[0]), dtype=torch.int8, device=self.device)
                for _ in range(2)
            )
            widths[stored] = 2 * source.nbytes
            copies = [self.copy(source, target)] * layers
            calls[f"copy, U {stored}"] = captured(
                lambda c=copies: [f() for f in c], self.watch.cuda
            )
            for contender in self.contenders:
                if contender.stored == stored:
                    steps = [self.call(contender, given, pool) for pool in pools]
                    calls[contender.name] = captured(
                        lambda c=steps: [f() for f in c], self.watch.cuda
                    )
        times = self.watch.interleaved(calls, self.options.seconds)
        rows = {}
        for name, found in times.items():
            per_step = [[x / layers for x in part] for part in found.device]
            flat = sorted(x for part in per_step for x in part)
            median = flat[len(flat) // 2]
            width = widths[name.rsplit(" ", 1)[1]]
            rows[name] = {
                "ms": per_step, "median": median, "min": flat[0], "max": flat[-1],
                "bytes": width, "gbps": width / median / 1e6,
            }  # fmt: skip
            self.say(f"batch {batch}, {name}: {1e3 * median:.1f} us, {rows[name]['gbps']:.0f} GB/s")
        self.result["step"].append({"batch": batch, "layers": layers, "rows": rows})

    @staticmethod
    def copy(source: Tensor, target: Tensor) -> Call:
        return lambda: target.copy_(source)

    @staticmethod
    def call(contender: Contender, given: dict[str, Tensor], pool: tuple[Tensor, Tensor]) -> Call:
        options, backend = SOLVES[contender.solve], contender.backend
        return lambda: fused_recurrent_gka_(**given, state=pool, backend=backend, **options)


def markdown(result: dict) -> str:
    """Time of a step in us (lowest..highest), and its share of a copy's speed."""
    heads = " | ".join(f"batch {part['batch']}: us | GB/s" for part in result["step"])
    lines = [
        f"{result['card']}, {result['heads']} heads, K = V = {result['dim']}, one token a sequence.",
        f"`{result['command']}`, {result['date']}, commit {result['commit']}.",
        "",
        f"| kernel, solve, storage of U | {heads} |",
        "|---" * (1 + 2 * len(result["step"])) + "|",
    ]
    names = result["step"][0]["rows"] if result["step"] else ()
    for name in names:
        cells = []
        for part in result["step"]:
            row = part["rows"][name]
            low, high = 1e3 * row["min"], 1e3 * row["max"]
            cells += [f"{1e3 * row['median']:.1f} ({low:.1f}..{high:.1f})", f"{row['gbps']:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    failed = [f"not timed: {n}: {c['errors']}" for n, c in result["checks"].items() if not c["ok"]]
    return "\n".join([*lines, *failed]) + "\n"


def plot(result: dict, path: Path) -> bool:
    """Time of a step over the batch size; whether matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    batches = [part["batch"] for part in result["step"]]
    for axis, stored in zip(axes, STORED, strict=True):
        for name in result["step"][0]["rows"]:
            if name.endswith(f"U {stored}"):
                medians = [1e3 * part["rows"][name]["median"] for part in result["step"]]
                style = "k--" if name.startswith("copy") else "o-"
                axis.loglog(batches, medians, style, label=name.rsplit(",", 1)[0], markersize=4)
        axis.set(xlabel="sequences", title=f"U stored as {stored}", xticks=batches)
        axis.set_xticklabels(map(str, batches))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("us a step")
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"{result['card']}: one token a sequence, {result['heads']} heads of {result['dim']}"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cpu: a trial of the command, tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=0.25, help="for each row and batch size")
    parser.add_argument("--commit", help="what the tables name, where there is no repository")
    options = parser.parse_args(arguments)
    options.command = "python -m benchmarks.decode" + (
        ""
        if options.batches == list(BATCHES)
        else f" --batches {' '.join(map(str, options.batches))}"
    )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    result = Bench(options).run()
    write(options.output / "decode.json", json.dumps(result, indent=1) + "\n")
    write(options.output / "decode.md", markdown(result))
    print(markdown(result))
    if not plot(result, options.output / "decode.png"):
        print("no plot: matplotlib is not installed")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
