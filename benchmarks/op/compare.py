"""Compare contenders in one process: first calls and memory of each, then interleaved times of all.

Each group of functions of one size is warmed up (first calls compile and tune; their seconds are reported),
then run in rounds of all functions. Ratios are of medians within a round.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from benchmarks import registry
from benchmarks.op.trained import TrainedHeads
from benchmarks.registry import Build, Contender, Inputs, NotAvailable, Size, reason
from benchmarks.results import Run
from torch import Tensor, nn

from gka.experiments.stopwatch import Call
from gka.ops import backends

Make = Callable[[], dict[str, Call]]
TRAINED = "trained"


class Comparison(Run):
    """One run of `python -m benchmarks.run op`."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("op", options)
        asked = backends.Call(torch.device(options.device), torch.bfloat16)
        self.backend = backends.resolve_backend(options.backend, asked)
        self.found |= {"backend": self.backend, "keys": options.keys, "groups": []}
        self.trained = None
        if options.keys == TRAINED:
            self.trained = TrainedHeads(options.model, self.device)
            self.found["trained"] = self.trained.about
            self.say(self.trained.told())

    def inputs(self, size: Size) -> Inputs:
        """Random ones, or a trained model's.

        Raises:
            NotAvailable: the model has no such heads.
        """
        if self.trained is not None:
            return self.trained.inputs(size)
        return registry.make_inputs(size, self.options.keys, self.device)

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return self.options.limit_seconds - self.elapsed

    def card(self) -> Any:
        """The device's name, and its measured speed of a matrix product and of a copy."""
        if not self.watch.cuda:
            return {"name": super().card()}
        n, side = 8192, 1 << 30
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        source, target = (torch.empty(side, device="cuda", dtype=torch.int8) for _ in range(2))
        calls: dict[str, Call] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
        times = self.watch.interleaved(calls, 0.3)
        matmul, copy = (times[name].as_json() for name in calls)
        return {
            "name": super().card(), "matmul": matmul, "copy": copy,
            "matmul_tflops": 2.0 * n**3 / matmul["median"] / 1e9,
            "copy_tbps": 2 * side / copy["median"] / 1e9,
        }  # fmt: skip

    def group(self, size: Size, contenders: list[Contender], repeated: bool = False) -> None:
        """Measure some contenders at one size, interleaved."""
        entries: dict[str, dict] = {}
        group = {
            "size": str(size), "shape": vars(size), "repeated": repeated, "contenders": entries,
        }  # fmt: skip
        self.found["groups"].append(group)
        inputs = calls = None
        try:
            inputs = self.inputs(size)
            calls = {}
            for contender in contenders:
                found = self.attempt(contender, size, inputs, entries)
                calls |= {(contender.name, which): call for which, call in found.items()}
            self.measure(str(size), calls, entries)
        except Exception as error:
            status = "not run" if isinstance(error, NotAvailable) else "failed"
            for contender in contenders:
                entries.setdefault(contender.name, {"status": status, "message": reason(error)})
        del inputs, calls
        self.free()

    def attempt(
        self, contender: Contender, size: Size, inputs: Inputs, entries: dict[str, dict]
    ) -> dict[str, Call]:
        """Make the first calls of one contender and fill its entry; returns no calls if it fails."""
        device = self.options.device
        leaves = [getattr(inputs, name) for name in contender.leaves]
        own = sum(x.nbytes for x in [*leaves, inputs.do])

        def load() -> Callable[[Inputs], Tensor]:
            refusal = contender.why_not(size, device, training=False)
            if refusal is not None:
                raise NotAvailable(refusal)
            return contender.load()

        found, entry = self.first(
            f"{size}: {contender.name}",
            lambda: registry.passes(load(), inputs, contender.leaves),
            lambda: own,
        )
        if found and contender.flops is not None:
            entry["flops"] = contender.flops(size)
        wrong = contender.why_not(size, device, training=True)
        if found and wrong is not None:
            entry["wrong"] = wrong
        entries[contender.name] = entry
        return found

    def layers(self) -> None:
        """Measure all layers, interleaved."""
        size = self.options.layer_size
        entries: dict[str, dict] = {}
        self.found["layer"] = {"size": str(size), "contenders": entries}
        calls: dict = {}
        peers = "gated_delta_rule" in self.options.peers
        for name, build in registry.layers(self.backend, peers).items():
            _, found, entries[name] = self.first_layer(f"layer, {size}: {name}", build)
            calls |= {(name, which): call for which, call in found.items()}
        self.measure(f"layer, {size}", calls, entries)
        del calls
        self.free()

    def first_layer(
        self, what: str, build: Build
    ) -> tuple[nn.Module | None, dict[str, Call], dict]:
        """A layer, its calls and their entry, as from `first`.

        Memory includes the weights, the input and the gradient of the output.
        """
        size = self.options.layer_size
        built: list[nn.Module] = []

        def make() -> dict[str, Call]:
            torch.manual_seed(0)
            built.append(build(size).to(self.device, torch.bfloat16))
            return registry.layer_passes(built[0], size, self.device)

        def own() -> int:
            return sum(p.nbytes for p in built[0].parameters()) + 2 * 2 * size.length * size.hidden

        found, entry = self.first(what, make, own)
        if built:
            entry["parameters"] = sum(p.numel() for p in built[0].parameters())
        return (built[0] if built else None), found, entry

    def first(self, what: str, make: Make, own: Callable[[], int]) -> tuple[dict[str, Call], dict]:
        """The calls of `make` after a first run of each, and an entry with its seconds and memory.

        `own` are bytes allocated before, which are added to the memory.
        """
        if self.left <= 0:
            limit = self.options.limit_seconds
            return {}, {"status": "not run", "message": f"the limit of {limit:.0f} s was reached"}
        try:
            found = make()
            seconds = {which: self.watch.once(call) for which, call in found.items()}
            peak = self.watch.peak_bytes(found["forward+backward"])
        except Exception as error:
            self.say(f"{what}: {reason(error)}")
            self.free()
            absent = isinstance(error, NotAvailable)
            return {}, {"status": "not run" if absent else "failed", "message": reason(error)}
        self.say(f"{what}: first calls " + ", ".join(f"{s:.1f} s" for s in seconds.values()))
        peak = None if peak is None else peak + own()
        return found, {"status": "ok", "first_call_s": seconds, "peak_bytes": peak}

    def measure(self, what: str, calls: dict, entries: dict[str, dict]) -> None:
        """Time calls, which are named (name, pass), into the entries of their names."""
        try:
            times = self.watch.interleaved(calls, self.options.seconds)
        except Exception as error:
            for name, _ in calls:
                entries[name] = {"status": "failed", "message": reason(error)}
            return
        for (name, which), found in times.items():
            entries[name][which] = found.as_json()
        lines = [f"{n} {which} {t.as_json()['median']:.3f}" for (n, which), t in times.items()]
        self.say(f"{what}: " + "; ".join(lines))
        self.note()

    def free(self) -> None:
        """Release cached memory of the device."""
        if self.watch.cuda:
            torch.cuda.empty_cache()
