"""One cell of `python -m benchmarks.run model`: training steps of a model of one size and mixer, timed.

A step is forward, loss, backward, AdamW (fused on a GPU) and clearing the gradients, on random tokens that
lie on the device. The first step, which compiles and tunes, is timed by itself; warm-up steps are left out.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks import results
from benchmarks.model.kernel_groups import grouped
from benchmarks.model.sizes import MIXERS, SIZES, ModelSize, model_flops, peak_tflops
from benchmarks.op.profile import kernels, total
from benchmarks.registry import NotAvailable, reason
from benchmarks.stopwatch import Stopwatch
from torch import Tensor

from gka.experiments import fla_mixers
from gka.models.loss import compiled_on_gpu
from gka.models.recomputation import checkpoint_arguments
from gka.ops import (
    available_backends,
    available_external,
    last_backend,
    why_not_external,
    why_unavailable,
)
from gka.ops.backends import known_backends
from gka.ops.external import EXTERNAL, Rule

BATCHES = 4  # of tokens, read in turn
SHOWN = 12  # kernels that a cell lists
DELTA_RULES: dict[str, Rule] = {"deltanet": "delta_rule", "gated_deltanet": "gated_delta_rule"}
COMPILES = ("off", "layers", "model", "cuda-graphs")
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Cell:
    """What one process measures.

    Attributes:
        size: a key of SIZES. mixer: a key of MIXERS, or of `fla_mixers.LAYERS`.
        compiled: of COMPILES: nothing; each decoder layer by itself; the model with its loss as one graph;
            or that in CUDA graphs (mode="reduce-overhead").
        checkpoint: as `gka train`'s `gradient_checkpointing`.
    """

    size: str
    mixer: str
    compiled: str
    checkpoint: str
    steps: int
    warm_up: int
    device: str


def build(cell: Cell, size: ModelSize) -> Any:
    """The model with random weights, in training mode.

    Raises:
        NotAvailable: kernels or a layer of another library are not there.
    """
    from gka.models import GKAConfig, GKAForCausalLM

    foreign = cell.mixer in fla_mixers.LAYERS
    if torch.device(cell.device).type == "cuda" and not foreign:
        refuse_plain_torch(cell, size)
    config = GKAConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_heads=size.heads, head_dim=size.dim, **(MIXERS["gla"] if foreign else MIXERS[cell.mixer]),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(cell.device):
        model: Any = GKAForCausalLM(config)
        if foreign:
            fla_mixers.replace_mixers(model, cell.mixer, size)
    if size.precision == "bfloat16":
        model = model.to(torch.bfloat16)
    arguments = checkpoint_arguments(cell.checkpoint)
    if arguments is not None:
        name = "activation_checkpointing_enable"  # in newer transformers
        getattr(model, name, model.gradient_checkpointing_enable)(arguments)
    return model.train()


def refuse_plain_torch(cell: Cell, size: ModelSize) -> None:
    """A mixer is measured on kernels or not at all.

    Raises:
        NotAvailable: no backend, or for a delta rule no installed library, has kernels for it; with the
            reasons.
    """
    config, dims = MIXERS[cell.mixer], (size.dim, size.dim)
    if cell.mixer in DELTA_RULES:
        rule = DELTA_RULES[cell.mixer]
        found = available_external(rule, cell.device, dims=dims)
        reasons = (f"{x}: {why_not_external(x, rule, cell.device, dims=dims)}" for x in EXTERNAL)
    elif config["mixer"] in ("gka", "gla"):
        call = (cell.device, torch.bfloat16, config.get("solver", "chebyshev"), dims)
        kernels = [x for x in known_backends() if x not in ("auto", "torch", "reference")]
        found = [x for x in available_backends(*call) if x in kernels]
        reasons = (f"{x}: {why_unavailable(x, *call)}" for x in kernels)
    else:
        return
    if not found:
        raise NotAvailable(f"only plain torch could run it here. {' '.join(reasons)}")


def compiled(cell: Cell, model: Any) -> Any:
    """The model as the cell compiles it; `layers` changes it in place."""
    if cell.compiled == "layers":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    if cell.compiled in ("off", "layers"):
        return model
    mode = "reduce-overhead" if cell.compiled == "cuda-graphs" else None
    return torch.compile(model, dynamic=False, mode=mode)


def make_step(cell: Cell, size: ModelSize, model: Any) -> Step:
    """One training step; returns the loss, on the device."""
    cuda = torch.device(cell.device).type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    shape = (BATCHES, size.batch, size.length)
    tokens = torch.randint(size.vocabulary, shape, device=cell.device)
    run = compiled(cell, model)
    taken = 0

    def loss_pieces() -> AbstractContextManager:
        return nullcontext() if cell.compiled == "off" else compiled_on_gpu()

    def precision() -> AbstractContextManager:
        if size.precision != "autocast":
            return nullcontext()
        return torch.autocast(cell.device.split(":")[0], dtype=torch.bfloat16)

    def step() -> Tensor:
        nonlocal taken
        ids = tokens[taken % BATCHES]
        taken += 1
        if cell.compiled == "cuda-graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with precision(), loss_pieces():
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed(step: Step, repeats: int, watch: Stopwatch) -> tuple[list[float], list[float]]:
    """Milliseconds of each of some queued steps, on the device and until the call returned."""
    marks: list[Any] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if watch.cuda else time.perf_counter())
        if watch.cuda:
            marks[-1].record()

    host = []
    watch.wait()
    mark()
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - begin))
        mark()
    watch.wait()
    pairs = itertools.pairwise(marks)
    return [a.elapsed_time(b) if watch.cuda else 1e3 * (b - a) for a, b in pairs], host


def seconds(call: Callable[[], object], watch: Stopwatch) -> float:
    watch.wait()
    begin = time.perf_counter()
    call()
    watch.wait()
    return time.perf_counter() - begin


def measure(cell: Cell) -> dict[str, Any]:
    """All figures of a cell; of one that cannot run the reason, of one that needs more memory "oom"."""
    try:
        return _measure(cell, SIZES[cell.size])
    except torch.OutOfMemoryError as error:
        return {"status": "oom", "message": reason(error)}
    except NotAvailable as error:
        return {"status": "not run", "message": reason(error)}
    except Exception as error:  # whatever another library raises, to be told in the table
        refused = cell.mixer in fla_mixers.LAYERS
        return {"status": "not run" if refused else "failed", "message": reason(error)}


def _measure(cell: Cell, size: ModelSize) -> dict[str, Any]:
    watch = Stopwatch(cell.device)
    model = build(cell, size)
    parameters = sum(p.numel() for p in model.parameters())
    step = make_step(cell, size, model)
    first = seconds(step, watch)
    for _ in range(cell.warm_up):
        step()
    if watch.cuda:
        torch.cuda.reset_peak_memory_stats()
    device, host = timed(step, cell.steps, watch)
    peak = torch.cuda.max_memory_allocated() if watch.cuda else None
    loss = step().item()
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} after {cell.steps} steps")
    ran = last_backend() if cell.mixer != "attention" and ":" not in cell.mixer else None
    listed = kernels(step, watch)
    body = parameters - model.get_input_embeddings().weight.numel()
    return {
        "status": "ok", "parameters": parameters, "tokens": size.tokens, "backend": ran,
        "first_step_s": first, "step_ms": device, "host_ms": host,
        "device_ms": total(listed)[0], "launches": total(listed)[1],
        "kernels": [vars(kernel) for kernel in listed[:SHOWN]], "groups": grouped(listed),
        "peak_bytes": peak,
        "loss": loss, "checkpoint": cell.checkpoint,
        **utilisation(cell, size, body, statistics.median(device)), "made": made(watch),
    }  # fmt: skip


def utilisation(cell: Cell, size: ModelSize, body: int, ms: float) -> dict[str, Any]:
    """Tokens a second, and TFLOP/s of the model: 6 N a token, and with the mixer's own products."""
    matrices, whole = model_flops(cell.mixer, size, body)
    return {
        "tokens_per_s": 1e3 * size.tokens / ms, "tflops_6n": matrices / ms / 1e9,
        "tflops": None if whole is None else whole / ms / 1e9,
    }  # fmt: skip


def made(watch: Stopwatch) -> dict[str, Any]:
    """On what, and with what."""
    card = torch.cuda.get_device_name() if watch.cuda else "CPU"
    return {
        "card": card, "peak_tflops": peak_tflops(card), "versions": results.versions(),
        "commit": results.commit(),
    }  # fmt: skip
