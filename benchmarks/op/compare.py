"""Our op and layer against their peers on this GPU: `python -m benchmarks.gpu --output DIR`.

Every function that is compared runs in this process, in turn. Writes gpu.json with all repeats, gpu.md,
gpu.png, and with --profile, once all is timed, the kernels of one training step of the op and of the layers
in profile.txt.

Each group of functions of one size is warmed up (first calls compile and tune: their seconds are reported),
then run in rounds, in turn within each; a ratio is that of medians within a round. Times are CUDA events
around one call that follows others without waiting, the second-level cache emptied before it. Forward runs
without gradients; forward + backward is torch.autograd.grad with a fixed random gradient of the output.
Peak memory is that of forward + backward with the function's own inputs and the gradient of its output.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from benchmarks import contenders as registry
from benchmarks import gpu_layer, gpu_profile, gpu_report
from benchmarks.contenders import Contender, Inputs, LayerSize, NotAvailable, Size, passes, reason
from benchmarks.gpu_options import LAYER, parse
from benchmarks.output import own
from benchmarks.stopwatch import Call, Stopwatch

from gka.data.files import write_text
from gka.ops import backends

Make = Callable[[], dict[str, Call]]
TUNING_SHARE = (
    0.5  # of the time limit, for compiling the peers' kernels before anything is measured
)


class Bench:
    """One run: options, clock and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.perf_counter()
        self.watch = Stopwatch(options.device)
        device = torch.device(options.device)
        self.backend = backends.resolve_backend(
            options.backend, backends.Call(device, torch.bfloat16)
        )
        self.result = {
            "command": options.command,
            "date": datetime.date.today().isoformat(), "commit": options.commit or commit(),
            "versions": versions(), "card": self.card(), "backend": self.backend,
            "keys": options.keys, "groups": [],
        }  # fmt: skip

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def left(self) -> float:
        return self.options.limit_seconds - self.elapsed

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:5.0f} s] {text}", flush=True)

    def card(self) -> dict:
        """The device's name, and what it reaches in a matrix product and a copy."""
        if not self.watch.cuda:
            return {"name": "CPU, for a trial of the command: these times mean nothing"}
        n, side = 8192, 1 << 30
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        source, target = (torch.empty(side, device="cuda", dtype=torch.int8) for _ in range(2))
        calls: dict[str, Call] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
        times = self.watch.interleaved(calls, 0.3)
        matmul, copy = (times[name].as_json() for name in calls)
        return {
            "name": torch.cuda.get_device_name(), "matmul": matmul, "copy": copy,
            "matmul_tflops": registry.matmul_flops(n) / matmul["median"] / 1e9,
            "copy_tbps": 2 * side / copy["median"] / 1e9,
        }  # fmt: skip

    def run(self) -> dict:
        ours = [registry.ours(solver, self.backend) for solver in registry.SOLVERS]
        peers = [registry.PEERS[name] for name in self.options.peers]
        early = [peer for peer in peers if peer.name != "mesa_net"]
        sizes = self.options.sizes
        self.tune([*{(size.heads, size.dim): None for size in sizes}])
        for size in sizes:
            self.group(size, [*ours, *early])
        if self.options.layer:
            gpu_layer.measure(self)
        if len(early) < len(
            peers
        ):  # its first call is the slowest, so it must not delay the others
            base = [peer for peer in early if peer.name == registry.BASELINE]
            for size in sizes:
                self.group(size, [*base, registry.PEERS["mesa_net"]], repeated=True)
        if self.options.profile:
            gpu_profile.profile(self)
        self.result["seconds"] = self.elapsed
        self.say("done")
        self.save()
        return self.result

    def group(self, size: Size, contenders: list[Contender], repeated: bool = False) -> None:
        """Measure some contenders in turn at one size."""
        entries: dict[str, dict] = {}
        group = {
            "size": str(size), "shape": vars(size), "repeated": repeated, "contenders": entries,
        }  # fmt: skip
        self.result["groups"].append(group)
        inputs = calls = None
        try:
            inputs = registry.make_inputs(size, self.options.keys, self.options.device)
            calls = {}
            for contender in contenders:
                found = self.attempt(contender, size, inputs, entries)
                calls |= {(contender.name, which): call for which, call in found.items()}
            self.measure(str(size), calls, entries)
        except Exception as error:
            for contender in contenders:
                entries.setdefault(contender.name, {"status": "failed", "message": reason(error)})
        del inputs, calls
        self.free()

    def attempt(
        self, contender: Contender, size: Size, inputs: Inputs, entries: dict[str, dict]
    ) -> dict[str, Call]:
        """First calls and memory of one contender; nothing where it fails, which its entry then says."""
        leaves = [getattr(inputs, name) for name in contender.leaves]
        own = sum(x.nbytes for x in [*leaves, inputs.do])
        found, entry = self.first(
            f"{size}: {contender.name}",
            lambda: passes(contender.load(), inputs, contender.leaves),
            lambda: own,
        )
        if found and contender.flops is not None:
            entry["flops"] = contender.flops(size)
        entries[contender.name] = entry
        return found

    def first(self, what: str, make: Make, own: Callable[[], int]) -> tuple[dict[str, Call], dict]:
        """The calls that `make` gives, after a first run of each, and an entry: their seconds and memory.

        `own` bytes were there before and count as memory of the calls.
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
        """Times of calls by (name, pass) into the entries of their names."""
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
        self.save()

    def tune(self, pairs: list[tuple[int, int]]) -> None:
        """Compile the peers' kernels in processes of their own, one for each peer, heads and head dim.

        Only what they compile is kept, on disk: they choose their configurations in this process, alone.
        """
        names = [name for name in self.options.peers if name in registry.FROM_FLA]
        if not self.watch.cuda or not names or importlib.util.find_spec("fla") is None:
            return
        jobs = [(name, heads, dim) for name in names for heads, dim in pairs]
        jobs += [("layer", LAYER.heads, LAYER.dim)] if self.options.layer else []
        self.say(f"compiling the peers' kernels, {len(jobs)} processes")
        environment = os.environ | {"FLA_CACHE_RESULTS": "0"}
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu", "--compile", *map(str, job)],
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for job in jobs
        ]  # fmt: skip
        end = time.perf_counter() + TUNING_SHARE * self.left
        for job, process in zip(jobs, running, strict=True):
            try:
                process.wait(max(0.1, end - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                self.say(f"{job}: still compiling, goes on in this process")

    def free(self) -> None:
        if self.watch.cuda:
            torch.cuda.empty_cache()

    def save(self) -> None:
        """What is there so far: a run that is cut off leaves it."""
        write_text(self.options.output / "gpu.json", json.dumps(self.result, indent=1) + "\n")


def compile_peer(name: str, heads: int, dim: int) -> None:
    """The body of the processes of `Bench.tune`."""
    if name == "layer":
        size = LayerSize(LAYER.hidden, heads, dim, 1024)
        layer = registry.peer_layer(size).to("cuda", torch.bfloat16)
        calls = gpu_layer.passes(layer, size, "cuda")
    else:
        peer = registry.PEERS[name]
        inputs = registry.make_inputs(Size(1, 1024, heads, dim), "silu", "cuda")
        calls = passes(peer.load(), inputs, peer.leaves)
    for call in calls.values():
        call()
    torch.cuda.synchronize()


def commit() -> str | None:
    """Of the working tree, with a + if it was changed since; None outside a repository."""
    try:
        found, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.strip() + ("+" if changed.strip() else "")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__, "CUDA": torch.version.cuda}
    for name in ("triton", "flash-linear-attention"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    options = parse(__doc__ or "")
    if options.compile:
        name, heads, dim = options.compile
        compile_peer(name, int(heads), int(dim))
        return
    own(options.output)
    stored = options.stored
    result = Bench(options).run() if stored is None else json.loads(stored.read_text())
    gpu_report.show(result)
    write_text(options.output / "gpu.md", gpu_report.markdown(result))
    if not gpu_report.plot(result, options.output / "gpu.png"):
        print("no plot: matplotlib is not installed; --from gpu.json draws it elsewhere")
    if options.update:
        gpu_report.update(options.update, result)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
