"""Tokens a second of a decoder, recurrent against attention: `python -m benchmarks.run generation`.

One decoder of 400M parameters, random weights, with Gated KalmaNet in every layer and with softmax attention
in every layer; greedy text of --tokens tokens after contexts of several lengths. Checks first, then
the median and spread of three measurements on the wall clock. Writes generation.json, .md and .png.

- "gka, recorded" and "gka, launched": `GenerationSession` with its CUDA graph and without. The context is
  random tokens that were read.
- "attention, launched": the decoder on keys and values in memory that was set aside beforehand, each
  step writes one and attends to all. transformers' dynamic cache copies all of them at every token, and its
  static cache counts in a tensor that the layer waits for and attends through a mask; this has neither
  cost. The context's keys and values are random numbers: a step takes as long.
- "attention, recorded": the step at that context as a CUDA graph, repeated as it is, so that the text
  does not move on: what a cache of fixed size with a graph would reach at best.
- "attention, floor": the bytes of keys and values at the speed of a copy, and nothing else.
"""

import argparse
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from benchmarks import registry, results
from torch import Tensor

from gka import GenerationSession
from gka.experiments.ledger import markdown_table
from gka.experiments.stopwatch import captured, spread
from gka.models import GKACache, GKAForCausalLM, cache_tensors
from gka.models.cache import CACHE_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTEXTS, REPEATS, WARM_UP = (4096, 16384, 65536, 131072), 3, 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of logits, in the relative 2-norm


class KeysAndValues:
    """Keys and values in memory for `capacity` positions, in the protocol of transformers' caches.

    With `fixed` the next position is always the same: a step can be repeated as it is.
    """

    def __init__(self, model: GKAForCausalLM, batch: int, capacity: int) -> None:
        self.length, self.fixed = 0, False
        self.layers = [Pair(layer.mixer, batch, capacity) for layer in model.model.layers]

    @property
    def nbytes(self) -> int:
        """Of the positions that are filled."""
        return sum(x[:, :, : self.length].nbytes for y in self.layers for x in (y.keys, y.values))

    def fill(self, length: int) -> None:
        """Random keys and values up to `length`."""
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                x[:, :, self.length : length].normal_()
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write what is new and return all; the last layer of a step counts it."""
        end, layer = self.length + keys.shape[2], self.layers[layer_idx]
        layer.keys[:, :, self.length : end] = keys
        layer.values[:, :, self.length : end] = values
        if layer_idx == len(self.layers) - 1 and not self.fixed:
            self.length = end
        return layer.keys[:, :, :end], layer.values[:, :, :end]


class Pair:
    """One layer's keys and values [B,heads,capacity,head_dim]."""

    def __init__(self, mixer: Any, batch: int, capacity: int) -> None:
        weight = mixer.k_proj.weight
        shape = (batch, mixer.num_kv_heads, capacity, mixer.head_dim)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)


def attention_step(model: GKAForCausalLM, tokens: Tensor, cache: Any) -> Tensor:
    """Logits [B,V] after tokens [B,T]."""
    options: dict[str, Any] = {CACHE_NAME: cache, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=tokens, **options).logits[:, -1]


class Bench(results.Run):
    """One run of `python -m benchmarks.run generation`."""

    def run(self) -> dict[str, Any]:
        """Check and time both models."""
        options, dtype = self.options, torch.bfloat16 if self.watch.cuda else torch.float32
        self.found |= {
            "size": options.size, "dtype": str(dtype).removeprefix("torch."),
            "batch": options.batch, "tokens": options.tokens, "checks": {}, "rows": [],
        }  # fmt: skip
        with torch.no_grad():
            self.bandwidth()
            self.kalmanet(registry.model(options.size, dtype, self.device, None))
            gc.collect()
            mixers = ["attention"] * registry.MODELS[options.size]["num_hidden_layers"]
            self.attention(registry.model(options.size, dtype, self.device, mixers))
        self.note(seconds=self.elapsed)
        return self.found

    def bandwidth(self) -> None:
        size = 1 << 30 if self.watch.cuda else 1 << 24
        source, target = (torch.empty(size, dtype=torch.int8, device=self.device) for _ in range(2))
        times = self.watch.interleaved({"copy": lambda: target.copy_(source)}, 0.2)["copy"]
        self.found["copy_gbps"] = 2 * size / times.as_json()["median"] / 1e6
        self.say(f"a copy: {self.found['copy_gbps']:.0f} GB/s, read and written")

    def random_tokens(self, length: int) -> Tensor:
        return torch.randint(32000, (self.options.batch, length), device=self.device)

    def passed(self, name: str, ok: bool, told: str) -> None:
        """Say and keep a check.

        Raises:
            RuntimeError: it failed; nothing is timed.
        """
        self.found["checks"][name] = {"ok": ok, "told": told}
        self.say(f"{name}: {'' if ok else 'FAILED: '}{told}")
        if not ok:
            raise RuntimeError(f"{name}: {told}")

    def kalmanet(self, model: GKAForCausalLM) -> None:
        self.parameters("gka", model)
        sessions = {
            "gka, recorded": GenerationSession(model),
            "gka, launched": GenerationSession(model, cuda_graph=False),
        }
        reason = sessions["gka, recorded"].why_not_graphed
        self.found["why_not_recorded"] = reason
        if reason is not None:
            self.say(f"gka, recorded: not measured: {reason}")
            del sessions["gka, recorded"]
        prompt = self.random_tokens(100)
        texts = [
            torch.stack(list(session.append(prompt).generate(self.options.tokens, eos_token_id=[])))
            for session in sessions.values()
        ]
        same = all(torch.equal(text, texts[-1]) for text in texts)
        self.passed("gka", same, "the same text by every way" if same else "texts differ")
        context = GenerationSession(model, cuda_graph=False)
        for length in self.options.contexts:
            context.append(self.random_tokens(length - context.num_tokens))
            states = sum(x.nbytes for x in cache_tensors(context._contents.cache).values())
            for name in sessions:
                session = context.fork()
                session.cuda_graph = None if name == "gka, recorded" else False
                self.row(name, length, states, self.writes(session))

    def writes(self, session: GenerationSession) -> Callable[[int], None]:
        def write_on(tokens: int) -> None:
            for _ in session.generate(tokens, eos_token_id=[]):
                pass

        return write_on

    def attention(self, model: GKAForCausalLM) -> None:
        self.parameters("attention", model)
        self.check_attention(model)
        capacity = max(self.options.contexts) + WARM_UP + (REPEATS + 1) * self.options.tokens
        cache = KeysAndValues(model, self.options.batch, capacity)
        for length in self.options.contexts:
            cache.length = min(cache.length, length)  # what was written beyond, is again
            cache.fill(length)
            states = cache.nbytes
            cache.fixed = False
            self.row("attention, launched", length, states, self.attends(model, cache))
            cache.length, cache.fixed = length, True
            if self.watch.cuda:
                self.row("attention, recorded", length, states, self.repeats(model, cache))
            seconds = self.options.tokens * states / self.found["copy_gbps"] / 1e9
            self.keep("attention, floor", length, states, self.options.tokens, [seconds])

    def attends(self, model: GKAForCausalLM, cache: KeysAndValues) -> Callable[[int], None]:
        first = self.random_tokens(1)

        def write_on(tokens: int) -> None:
            last = first
            for _ in range(tokens):
                last = attention_step(model, last, cache).argmax(-1, keepdim=True)

        return write_on

    def repeats(self, model: GKAForCausalLM, cache: KeysAndValues) -> Callable[[int], None]:
        tokens, found = self.random_tokens(1), []

        def step() -> None:
            found[:] = [attention_step(model, tokens, cache)]

        replay = captured(step, self.watch.cuda)

        def write_on(steps: int) -> None:
            for _ in range(steps):
                replay()
                tokens.copy_(found[0].argmax(-1, keepdim=True))

        return write_on

    def check_attention(self, model: GKAForCausalLM) -> None:
        """The memory set aside holds what transformers' cache holds: same logits after the same tokens."""
        prompt, more = self.random_tokens(100), self.random_tokens(5)
        ours, theirs = KeysAndValues(model, self.options.batch, 128), GKACache(model.config)
        a = b = torch.empty(0)
        for part in (prompt, *more.split(1, 1)):
            a, b = (attention_step(model, part, cache).double() for cache in (ours, theirs))
        error = float((a - b).norm() / b.norm())
        self.passed("attention", error < TOLERANCE[model.dtype], f"logits differ by {error:.1e}")

    def parameters(self, name: str, model: GKAForCausalLM) -> None:
        count = sum(p.numel() for p in model.parameters())
        self.found.setdefault("parameters", {})[name] = count
        self.say(f"{name}: {count / 1e6:.0f} M parameters")

    def row(self, name: str, length: int, states: int, write_on: Callable[[int], None]) -> None:
        """Time `write_on`, warm."""
        write_on(WARM_UP)
        # launching takes the host so long that a few tokens tell
        tokens = self.options.tokens if "recorded" in name else -(-self.options.tokens // 4)
        seconds = [self.watch.once(lambda: write_on(tokens)) for _ in range(REPEATS)]
        self.keep(name, length, states, tokens, seconds)

    def keep(self, name: str, length: int, states: int, tokens: int, seconds: list[float]) -> None:
        rates = [self.options.batch * tokens / x for x in seconds]
        row = {
            "name": name, "context": length, "tokens": tokens, "seconds": seconds, "state_bytes": states,
            **dict(zip(("median", "min", "max"), spread(rates), strict=True)),
        }  # fmt: skip
        self.found["rows"].append(row)
        self.say(
            f"{name}, context {length}: {row['median']:.0f} tokens/s "
            f"({row['min']:.0f}..{row['max']:.0f}), {states / 2**20:.1f} MiB"
        )
        self.note()


def by_name(result: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by name and context."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["name"], {})[row["context"]] = row
    return found


def markdown(result: dict[str, Any]) -> str:
    """Tokens a second (lowest..highest), and MiB of states or keys and values."""
    rows = by_name(result)
    contexts = sorted({row["context"] for row in result["rows"]})
    head = ["tokens/s"]
    for context in contexts:
        head += [f"context {context}: tokens/s", "MiB"]
    table = []
    for name, found in rows.items():
        cells = []
        for context in contexts:
            row = found.get(context)
            if row is None:
                cells += ["", ""]
                continue
            spread = f" ({row['min']:.0f}..{row['max']:.0f})" if len(row["seconds"]) > 1 else ""
            cells += [f"{row['median']:.0f}{spread}", f"{row['state_bytes'] / 2**20:.1f}"]
        table.append([name, *cells])
    parts = [
        f"{result['card']}, {result['size']}, {result['dtype']}, batch {result['batch']}, "
        f"{result['tokens']} tokens, launched a quarter. A copy: {result['copy_gbps']:.0f} GB/s.\n"
        f"`{result['command']}`, {result['date']}, commit {result['commit']}.",
        markdown_table(head, table),
    ]
    if result["why_not_recorded"]:
        parts.append(f"gka, recorded: not measured: {result['why_not_recorded']}")
    return "\n\n".join(parts) + "\n"


def draw(result: dict[str, Any], figure: "Figure") -> None:
    """Tokens a second and memory over the context."""
    figure.set_size_inches(11, 4.5)
    speed, memory = figure.subplots(1, 2)
    for name, rows in by_name(result).items():
        contexts = sorted(rows)
        style = "k--" if name.endswith("floor") else "o-"
        speed.loglog(contexts, [rows[n]["median"] for n in contexts], style, label=name)
        if name in ("gka, launched", "attention, launched"):
            sizes = [rows[n]["state_bytes"] / 2**20 for n in contexts]
            memory.loglog(contexts, sizes, "o-", label=name.split(",")[0])
    speed.set(xlabel="tokens before", ylabel="tokens a second")
    memory.set(xlabel="tokens before", ylabel="MiB of states, or keys and values")
    for axis in (speed, memory):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{result['card']}: {result['size']}, batch {result['batch']}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser("generation", __doc__)
    add = parser.add_argument
    add("--size", choices=registry.MODELS, default="medium")
    add("--contexts", type=int, nargs="+", help=f"default: {CONTEXTS}; 128 256 on a CPU")
    add("--batch", type=int, default=1)
    add("--tokens", type=int, default=64, help="of each measurement; a quarter where launched")
    options = results.parse(parser, arguments)
    cuda = torch.device(options.device).type == "cuda"
    options.contexts = sorted(options.contexts or (CONTEXTS if cuda else (128, 256)))
    return options


def main(arguments: list[str] | None = None) -> None:
    bench = Bench("generation", parse(arguments))
    found = bench.run()
    print(markdown(found))
    bench.report(markdown(found), lambda figure: draw(found, figure))
