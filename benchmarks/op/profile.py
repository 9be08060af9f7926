"""The profile of `python -m benchmarks.gpu`: kernels of one training step of the op and of the layers.

profile.txt and gpu.json are written after each part; a part that fails leaves its reason in its place.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import contenders as registry
from benchmarks import gpu_layer, kernel_profile
from benchmarks.contenders import Contender, Inputs, reason
from benchmarks.kernel_profile import Kernel

from gka.data.files import write_text

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

FEW = 10  # steps that the loop's speed is measured from
MEMORY = {
    "kept_bytes": "kept for the backward pass, output included",
    "peak_bytes": "peak, inputs, gradients and a layer's weights included",
}


def profile(bench: "Bench") -> None:
    """The op at the first size, then the layers if they were measured."""
    size, peers = bench.options.sizes[0], registry.BASELINE in bench.options.peers
    op = registry.ours("chebyshev", bench.backend)
    texts = [part(bench, "op_profile", f"{size}", op.name, partial(of_op, bench, op))]
    layers = registry.profiled_layers(bench.backend, peers) if bench.options.layer else {}
    for name, build in layers.items():
        save(bench, texts)
        work = partial(of_layer, bench, name, build)
        texts.append(part(bench, "layer_profile", f"{bench.options.layer_size}", name, work))
    save(bench, texts)


def part(bench: "Bench", key: str, size: str, name: str, work: Callable[[dict], None]) -> str:
    """The entry that `work` fills into the result's group `key`, and its text."""
    group = bench.result.setdefault(key, {"size": f"kernels of {size}", "contenders": {}})
    entry = group["contenders"][name] = {}
    try:
        work(entry)
    except Exception as error:
        entry |= {"status": "failed", "message": reason(error)}
        bench.say(f"kernels of {name}: {entry['message']}")
    bench.free()
    return f"one forward + backward of {name}, {size}\n{text_of(entry)}"


def save(bench: "Bench", texts: list[str]) -> None:
    write_text(bench.options.output / "profile.txt", "\n".join(texts))
    bench.save()


def of_op(bench: "Bench", op: Contender, entry: dict) -> None:
    """Fill the entry of the op at the first size."""
    size = bench.options.sizes[0]
    inputs = registry.make_inputs(size, bench.options.keys, bench.options.device)
    held = [inputs.do, *(getattr(inputs, name) for name in op.leaves)]
    found, begun = bench.first(
        f"kernels of {op.name}, {size}",
        lambda: registry.passes(op.load(), inputs, op.leaves),
        lambda: sum(x.nbytes for x in held),
    )
    entry |= begun
    if not found:
        return
    kernels = kernel_profile.kernels(found["forward+backward"], bench.watch)
    entry |= sums(kernels)
    if bench.watch.cuda:
        flops = float(size.batch * size.length * size.heads * registry.step_flops(size.dim))
        few, many = (forward_kernels(bench, inputs, steps) for steps in (FEW, registry.NUM_ITER))
        peak = bench.result["card"].get("matmul_tflops")
        more = registry.NUM_ITER - FEW
        entry["speeds"] = [kernel_profile.loop_speed(few, many, flops, more, peak)]


def forward_kernels(bench: "Bench", inputs: Inputs, num_iter: int) -> list[Kernel]:
    op = registry.ours("chebyshev", bench.backend, num_iter)
    return kernel_profile.kernels(
        registry.passes(op.load(), inputs, op.leaves)["forward"], bench.watch
    )


def of_layer(bench: "Bench", name: str, build: gpu_layer.Build, entry: dict) -> None:
    """Fill the entry of a layer."""
    size = bench.options.layer_size
    layer, found, begun = gpu_layer.first(bench, f"kernels of {name}, {size}", build)
    entry |= begun
    if layer is None or not found:
        return
    x = gpu_layer.hidden_states(size, bench.options.device).requires_grad_()
    entry["kept_bytes"] = bench.watch.kept_bytes(lambda: layer(x)[0])
    entry |= sums(kernel_profile.kernels(found["forward+backward"], bench.watch))


def sums(kernels: list[Kernel]) -> dict:
    """What an entry holds of kernels."""
    ms, launches = kernel_profile.total(kernels)
    return {"kernels_ms": ms, "launches": launches, "kernels": [asdict(k) for k in kernels]}


def text_of(entry: dict) -> str:
    """An entry in profile.txt."""
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['message']}\n"
    lines = [kernel_profile.table([Kernel(**k) for k in entry["kernels"]])]
    for key, words in MEMORY.items():
        if entry.get(key) is not None:
            lines.append(f"{entry[key] / 2**20:.0f} MiB {words}")
    return "\n".join([*lines, *entry.get("speeds", [])]) + "\n"
