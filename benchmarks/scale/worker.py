"""One process a GPU of `python -m benchmarks.run scale`: checks layouts, then measures cells in turn.

A step is that of `gka train`: float32 parameters, products in bfloat16, forward and backward pass, clipping,
fused AdamW. Rank 0 writes a file after each cell. A rank without memory says so in a file before it waits
for the others, so that the launcher can end ranks that wait for it inside a collective.
"""

import faulthandler
import gc
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from benchmarks.registry import reason
from benchmarks.scale.cells import Cell, model_config
from benchmarks.scale.check import check
from benchmarks.scale.files import Folder
from benchmarks.scale.step import (
    BFLOAT16,
    build,
    make_step,
    mean_over_ranks,
    random_rows,
    timed,
    wait,
)
from benchmarks.scale.trace import shares

from gka.models.recomputation import checkpoint_arguments
from gka.ops import last_backend
from gka.parallel import Job, start
from gka.storage import read_json
from gka.training.collector import frozen_heap
from gka.training.compilation import compiled, graphs


def measure(job: Job, folder: Folder, cell: Cell, tiny: bool) -> dict[str, Any]:
    """A cell's figures with the least checkpointing for which the memory suffices; the same on all ranks."""
    found: dict[str, Any] = {}
    for way in cell.ways:
        message = None
        try:
            found = attempt(job, cell, way, tiny)
        except torch.OutOfMemoryError as error:
            message = reason(error)
        if message is not None:
            folder.note_memory(cell.key, job.rank, way, message)
        free()
        told = [text for text in job.gather(message) if text]
        folder.forget_memory(cell.key, job.rank)
        if not told:
            return found
        found = {"status": "failed", "message": told[0], "checkpoint": way}
    return found


def free() -> None:
    """Give back the memory of the last model: its compiled code and its cycles hold it."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(job: Job, cell: Cell, way: str, tiny: bool) -> dict[str, Any]:
    """A cell's figures with one way of checkpointing.

    Raises:
        torch.OutOfMemoryError: on the ranks whose memory does not suffice.
    """
    config, layout, cuda = model_config(tiny), cell.layout, job.device.type == "cuda"
    model = build(config, layout, job, BFLOAT16, reshard_after_forward=cell.reshard)
    arguments = checkpoint_arguments(way)
    if arguments is not None:
        name = "activation_checkpointing_enable"  # in newer transformers
        getattr(model, name, model.gradient_checkpointing_enable)(arguments)
    shape = (cell.micro, cell.length)
    rows = random_rows(shape, config.vocab_size, layout.reader(job.rank), job)
    step = make_step(model, layout, job, rows, cast=True)
    before = graphs()
    with compiled([model], cell.compiled), frozen_heap():
        began = time.perf_counter()
        first = step()[0]
        wait(job)
        first_seconds = time.perf_counter() - began
        for _ in range(cell.warm_up):
            step()
        job.wait()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times, host, last = timed(step, cell.steps, job)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        traced = shares(step, lambda: wait(job), cuda)
    every = job.gather(times)
    traced["busy_ms"] = job.gather(traced["busy_ms"])
    return {
        "status": "ok", "checkpoint": way, "compiled": cell.compiled,
        "step_ms": [max(step) for step in zip(*every, strict=True)],
        "host_ms": statistics.median(host), "first_step_s": first_seconds,
        "peak_bytes": max(job.gather(peak or 0)) or None,
        "loss": [mean_over_ranks(job, first), mean_over_ranks(job, last)],
        "backend": last_backend(), **traced,
        "graphs": {name: count - before[name] for name, count in graphs().items()},
    }  # fmt: skip


def run(path: Path) -> None:
    """All that the launcher's file asks for; on SIGUSR1 every thread's stack goes to stderr."""
    faulthandler.register(signal.SIGUSR1)
    asked = read_json(path)
    folder = Folder(Path(asked["folder"]))
    job = start(asked["device"])
    if job.ranks == 1 and asked["device"] == "cuda":
        job.device = torch.device("cuda", 0)
    cells = [Cell(**{**cell, "sizes": tuple(cell["sizes"])}) for cell in asked["cells"]]
    if asked["check"]:
        begin(job, folder, f"check/{job.ranks}")
        tell(job, folder, f"check/{job.ranks}", check(job, asked["check"], asked["tiny"]))
        free()
    for cell in cells:
        if job.any(time.time() + needed(cell) > asked["until"]):
            told = {"status": "not measured", "message": "the time was spent"}
            tell(job, folder, cell.key, told)
            continue
        begin(job, folder, cell.key)
        try:
            tell(job, folder, cell.key, measure(job, folder, cell, asked["tiny"]))
        except Exception as error:
            folder.write(cell.key, {"status": "failed", "message": reason(error)})
            raise
    job.finish()


def needed(cell: Cell) -> float:
    """Seconds that a cell will take at least."""
    return 5.0 + 1.2 * cell.expected * (cell.steps + cell.warm_up + 3)


def begin(job: Job, folder: Folder, key: str) -> None:
    if job.is_main:
        folder.begin(key)


def tell(job: Job, folder: Folder, key: str, found: dict[str, Any]) -> None:
    if job.is_main:
        folder.write(key, found)
