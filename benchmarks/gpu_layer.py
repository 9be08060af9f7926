"""The layers' part of `python -m benchmarks.gpu`: what is called, what it holds, how long it takes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from benchmarks import contenders as registry
from benchmarks.contenders import LayerSize
from benchmarks.stopwatch import Call
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

Build = Callable[[LayerSize], nn.Module]


def passes(layer: nn.Module, size: LayerSize, device: str) -> dict[str, Call]:
    """The two calls that are measured of a layer, by name; gradients go to the input and all parameters."""
    x, do = hidden_states(size, device).requires_grad_(), hidden_states(size, device)
    layer.train()
    wanted = [x, *layer.parameters()]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(layer(x)[0], wanted, do),
    }


def hidden_states(size: LayerSize, device: str) -> Tensor:
    """Gaussian [1,T,hidden], bfloat16."""
    return torch.randn(1, size.length, size.hidden, device=device, dtype=torch.bfloat16)


def first(
    bench: "Bench", what: str, build: Build
) -> tuple[nn.Module | None, dict[str, Call], dict]:
    """A layer, its calls after a first run of each, and their entry, as of `Bench.first`.

    Memory counts the weights, the input and the gradient of the output too.
    """
    size, device = bench.options.layer_size, bench.options.device
    built: list[nn.Module] = []

    def make() -> dict[str, Call]:
        torch.manual_seed(0)
        built.append(build(size).to(device, torch.bfloat16))
        return passes(built[0], size, device)

    def own() -> int:
        return sum(p.nbytes for p in built[0].parameters()) + 2 * 2 * size.length * size.hidden

    found, entry = bench.first(what, make, own)
    if built:
        entry["parameters"] = sum(p.numel() for p in built[0].parameters())
    return (built[0] if built else None), found, entry


def measure(bench: "Bench") -> None:
    """Times of all layers, in turn."""
    size = bench.options.layer_size
    entries: dict[str, dict] = {}
    bench.result["layer"] = {"size": str(size), "contenders": entries}
    calls: dict = {}
    peers = registry.BASELINE in bench.options.peers
    for name, build in registry.layers(bench.backend, peers).items():
        _, found, entries[name] = first(bench, f"layer, {size}: {name}", build)
        calls |= {(name, which): call for which, call in found.items()}
    bench.measure(f"layer, {size}", calls, entries)
    del calls
    bench.free()
