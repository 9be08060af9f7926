"""Measure a card for plans: matrix products, the op, attention, a compiled layer, and the host's launches."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, normalize, scaled_dot_product_attention

from gka.models import GKAConfig
from gka.models.decoder import GKADecoderLayer
from gka.models.flops import peak_tflops, step_flops
from gka.ops import chunk_gka
from gka.parallel.planner.card import read_card
from gka.parallel.planner.job import Job
from gka.parallel.planner.work import layer_bytes

REPEATS, WARM_UP, FEW = 10, 4, 8


@dataclass(frozen=True)
class Sizes:
    """What is measured: B sequences of T tokens, H heads of each of `dims`, products of each of `widths`."""

    batch: int = 8
    length: int = 2048
    heads: int = 8
    dims: tuple[int, ...] = (64, 128)
    widths: tuple[int, ...] = (512, 1024, 2560)
    steps: int = 30


TRIAL = Sizes(1, 128, 2, (16, 32), (64, 128), 10)
"""Sizes for a CPU, where the figures mean nothing."""


def measure_card(device: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Figures of a card, ready for JSON and `read_card`; about a minute on a GPU, of which half is compiling.

    What is not measured, links and the step's gap, is taken from the H200's file, and "source" says so.

    Args:
        device: "cuda", or "cpu" to try it out.
        say: told what is being measured.
    """
    cuda = torch.device(device).type == "cuda"
    sizes, known = (Sizes() if cuda else TRIAL), read_card("h200")
    name = (
        torch.cuda.get_device_name(device) if cuda else "CPU, a trial: these figures mean nothing"
    )
    torch.manual_seed(0)
    say("matrix products")
    products = {width: _products(sizes, width, device) for width in sizes.widths}
    say("the op and attention, forward and backward")
    ops = [_op(sizes, dim, sizes.steps, device) for dim in sizes.dims]
    few = _op(sizes, sizes.dims[-1], FEW, device)
    saved = max(1e-6, ops[-1]["forward_ms"] - few["forward_ms"])
    each = (
        sizes.batch * sizes.length * sizes.heads * (sizes.steps - FEW) * step_flops(sizes.dims[-1])
    )
    say("a compiled layer" if cuda else "a layer")
    traffic, host = _layer(sizes, products, ops[-1], device, cuda)
    return {
        "name": name,
        "source": f"measured on {time.strftime('%Y-%m-%d')} by gka plan --measure with torch "
        f"{torch.__version__}; host_ms of attention as of gka; gap, host_ms of the rest of a step and "
        "links_gbs (assumed) from the file h200",
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else 1.0,
        "peak_tflops": peak_tflops(name) or max(products.values()),
        "product_tflops": {str(width): rate for width, rate in products.items()},
        "solve_tflops": each / saved / 1e9,
        "traffic_tbs": traffic,
        "host_ms": {"gka": host, "attention": host, "swa": host, "fixed": known.host_ms["fixed"]},
        "gap": known.gap,
        "links_gbs": known.links_gbs,
        "mixers": {"gka": ops, "attention": [_attention(sizes, sizes.dims[-1], device)]},
    }  # fmt: skip


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median time of a call; on a GPU by events around queued calls."""
    for _ in range(WARM_UP):
        call()
    if torch.device(device).type != "cuda":
        return statistics.median(_clocked(call) for _ in range(REPEATS))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # a head start for the host
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def _clocked(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _both(call: Callable[[], Any], leaves: list[Any]) -> Callable[[], object]:
    like = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), leaves, like)


def _products(sizes: Sizes, width: int, device: str) -> float:
    """TFLOP/s of a linear map from `width` to 8/3 of it, forward and backward."""
    tokens, wide = sizes.batch * sizes.length, 8 * width // 96 * 32
    options: Any = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    x, weight = torch.randn(tokens, width, **options), torch.randn(wide, width, **options)
    ms = milliseconds(_both(lambda: linear(x, weight), [x, weight]), device)
    return 6.0 * tokens * width * wide / ms / 1e9


def _inputs(sizes: Sizes, dim: int, device: str) -> list[Any]:
    shape = (sizes.batch, sizes.length, sizes.heads)
    dtype = torch.bfloat16
    q, k = (normalize(torch.randn(*shape, dim, device=device), dim=-1).to(dtype) for _ in range(2))
    v = torch.randn(*shape, dim, device=device, dtype=dtype)
    g = -0.05 * torch.rand(*shape, device=device)
    alpha, beta = (torch.rand(*shape, device=device) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v, g, alpha, beta)]


def _op(sizes: Sizes, dim: int, steps: int, device: str) -> dict[str, Any]:
    q, k, v, g, alpha, beta = leaves = _inputs(sizes, dim, device)

    def call() -> Any:
        return chunk_gka(q, k, v, g, g, alpha, num_iter=steps, beta=beta)[0]

    return _point(sizes, dim, call, leaves, device) | {"num_iter": steps}


def _attention(sizes: Sizes, dim: int, device: str) -> dict[str, Any]:
    leaves = _inputs(sizes, dim, device)[:3]

    def call() -> Any:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return _point(sizes, dim, call, leaves, device)


def _point(
    sizes: Sizes, dim: int, call: Callable[[], Any], leaves: list[Any], device: str
) -> dict[str, Any]:
    with torch.no_grad():
        forward = milliseconds(call, device)
    both = milliseconds(_both(call, leaves), device)
    return {
        "batch": sizes.batch, "length": sizes.length, "heads": sizes.heads, "dim": dim,
        "forward_ms": forward, "both_ms": both,
    }  # fmt: skip


def _layer(
    sizes: Sizes, products: dict[int, float], op: dict[str, Any], device: str, cuda: bool
) -> tuple[float, float]:
    """TB/s of what a layer does besides products and op; milliseconds of the host to launch both passes."""
    width = sizes.heads * sizes.dims[-1]
    config = GKAConfig(
        vocab_size=8,
        hidden_size=width,
        num_heads=sizes.heads,
        num_hidden_layers=1,
        num_iter=sizes.steps,
    )
    layer: Any = GKADecoderLayer(config, 0).to(device, torch.bfloat16)
    if cuda:
        layer.compile(dynamic=False)
    shape = (sizes.batch, sizes.length, width)
    x = torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    step = _both(lambda: layer(x, None), [x, *layer.parameters()])
    ms = milliseconds(step, device)
    job = Job(config, sizes.length, sizes.batch, sizes.batch, 1, autocast=False)
    tokens = sizes.batch * sizes.length
    nearest = min(products, key=lambda known: abs(known - width))
    multiplied = 6.0 * tokens * job.layer_parameters("gka") / products[nearest] / 1e9
    rest = max(0.05 * ms, ms - multiplied - op["both_ms"])
    if cuda:
        torch.cuda.synchronize()
    host = min(_clocked(step) for _ in range(3))
    return 3.0 * tokens * layer_bytes(job, "gka") / rest / 1e9, host
