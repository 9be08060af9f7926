"""A training step as `gka train` takes it, on one rank of any layout, and its time."""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gka.layers import parameter_groups
from gka.models import GKAForCausalLM
from gka.parallel import ContextParallel, Job, Layout, clip_grad_norm_, make_mesh, parallelize

BFLOAT16 = torch.bfloat16
Step = Callable[[], tuple[Tensor, Tensor]]


@cache
def mesh_of(layout: Layout, device: str) -> Any:
    """One mesh a layout: each makes communicators of its own, which take memory."""
    return make_mesh(layout, device)


def build(config: Any, layout: Layout, job: Job, dtype: torch.dtype | None, **options: Any) -> Any:
    """The model with the same weights on every rank, on its mesh; on one GPU without one, as `gka train`."""
    torch.manual_seed(0)
    with torch.device(job.device):
        model = GKAForCausalLM(config).train()
    if layout.ranks > 1:
        parallelize(model, mesh_of(layout, job.device.type), dtype=dtype, **options)
    return model


def make_step(model: Any, layout: Layout, job: Job, rows: Tensor, cast: bool) -> Step:
    """A training step on whole rows [B,T], the same on ranks that share a sequence; loss and gradients' norm.

    The loss times the number of readers, over all readers' targets: its mean over ranks is the batch's.
    """
    groups, cuda = parameter_groups(model, 0.1), job.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=cuda)
    targets = layout.readers * rows.shape[0] * (rows.shape[1] - 1)
    cp = mesh_of(layout, job.device.type)["cp"] if layout.cp > 1 else None

    def precision() -> AbstractContextManager:
        return torch.autocast(job.device.type, BFLOAT16) if cast else nullcontext()

    def inputs() -> dict[str, Any]:
        if cp is None:
            return {"input_ids": rows, "labels": rows}
        context = ContextParallel.even(cp, rows.shape[1], device=job.device)
        part = context.shard(rows)
        return {"input_ids": part, "labels": part, "context": context}

    def step() -> tuple[Tensor, Tensor]:
        with precision():
            loss = model(**inputs(), num_items_in_batch=targets).loss * layout.readers
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return step


def random_rows(shape: tuple[int, int], vocabulary: int, seed: int, job: Job) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, shape, generator=generator).to(job.device)


def mean_over_ranks(job: Job, value: Tensor) -> float:
    return statistics.fmean(job.gather(float(value)))


def wait(job: Job) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, repeats: int, job: Job) -> tuple[list[float], list[float], Tensor]:
    """Milliseconds of each of some queued steps, those until its call returned, and the last loss."""
    cuda, marks, host, loss = job.device.type == "cuda", [], [], torch.zeros(())

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    wait(job)
    job.wait()
    mark()
    for _ in range(repeats):
        began = time.perf_counter()
        loss, _ = step()
        host.append(1e3 * (time.perf_counter() - began))
        mark()
    wait(job)
    pairs = itertools.pairwise(marks)
    return [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs], host, loss
