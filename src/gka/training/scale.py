"""A run on any number of ranks: its mesh, its global batch, and what all ranks must have in common."""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from gka.errors import InputError
from gka.models.context import why_whole_rows
from gka.parallel import Layout, current, make_mesh, parallelize
from gka.parallel.context import CHUNK_SIZE
from gka.parallel.sharding import autocast
from gka.parallel.tensor import why_unsplit
from gka.training.compilation import code_checksum
from gka.training.config import OFF, ON, ParallelConfig, RunConfig, TrainingConfig
from gka.training.saving import BackgroundSaves
from gka.training.start import Fill


def chosen_layout(config: ParallelConfig, sequence_length: int) -> Layout:
    """The layout of this job's ranks.

    Raises:
        InputError: the numbers do not fit the number of ranks, or sequences are too short to be split.
    """
    layout = Layout.fitted(current().ranks, **asdict(config))
    most = -(-sequence_length // CHUNK_SIZE)
    if layout.cp > most:
        raise InputError(
            f"parallel.cp is {layout.cp}: sequences of {sequence_length} tokens are split over {most} ranks "
            f"at most, {CHUNK_SIZE} tokens each; raise data.sequence_length, or take dp_shard or tp"
        )
    return layout


def check_model(model: Any, layout: Layout, compiling: str) -> None:
    """Raise `InputError` if the model cannot be split as the layout says, or compiled when it is."""
    if layout.ranks > 1 and compiling in ("model", "cuda-graphs"):
        raise InputError(
            f"training.compile is {compiling!r}: on several ranks layers are gathered one by one; take "
            "'layers'"
        )
    if layout.tp > 1 and (why := why_unsplit(model, layout.tp)):
        raise InputError(f"parallel.tp is {layout.tp}: {why}")
    if layout.cp > 1 and (why := why_whole_rows(model.model.layers)):
        raise InputError(f"parallel.cp is {layout.cp}: {why}")


def background_saves(training: TrainingConfig) -> BackgroundSaves | None:
    """What writes the run's checkpoints while it trains, as `save_async` says; None: nothing."""
    wanted = training.save_async == ON or (training.save_async != OFF and current().ranks > 1)
    return BackgroundSaves(current()) if wanted else None


def place(
    model: Any, layout: Layout, training: TrainingConfig, fill: Fill | None
) -> tuple[Any, DeviceMesh | None]:
    """The model on this rank's device, for a `MeshTrainer`, and its mesh, if there are several ranks.

    Args:
        model: of `gka.training.start.first_model`. layout, training: of the run.
        fill: with several ranks, what gives the parallelised model its weights.
    """
    job = current()
    dtype = torch.bfloat16 if training.dtype == "bfloat16" else None
    if fill is not None:
        mesh = make_mesh(layout, job.device.type)
        parallelize(model, mesh, dtype=dtype)
        fill(model, job.device)
        return model, mesh
    model = model.to(job.device)
    if dtype is not None:
        autocast(model, job.device.type, dtype)
    return model, None


def blocks_of_a_step(training: TrainingConfig, readers: int) -> int:
    """The global batch: blocks of an optimizer step over all ranks."""
    return training.batch_size * training.gradient_accumulation * readers


def same_batch(training: TrainingConfig, wanted: int, readers: int) -> TrainingConfig:
    """The settings with which that many readers take `wanted` blocks a step.

    Micro-batches keep their size or become the next smaller one that fits; the rest is accumulated.

    Raises:
        InputError: no size fits, as the readers do not divide the global batch.
    """
    if wanted % readers:
        fitting = [n for n in range(1, wanted + 1) if wanted % n == 0]
        raise InputError(
            f"the run began with {wanted} blocks a step, which {readers} ranks or groups of ranks cannot "
            f"share evenly: resume it on {', '.join(map(str, fitting[:-1]))}"
            f"{' or ' if len(fitting) > 1 else ''}{fitting[-1]} of them (processes / (tp x cp))"
        )
    each = wanted // readers
    size = next(n for n in range(min(training.batch_size, each), 0, -1) if each % n == 0)
    return replace(training, batch_size=size, gradient_accumulation=each // size)


def common_facts(config: RunConfig) -> dict[str, str]:
    """What every rank of a run must have: settings and software."""
    settings = json.dumps(config.tables(), sort_keys=True).encode()
    return {
        "configuration": hashlib.sha256(settings).hexdigest()[:16],
        "gated-kalmanet": f"code {code_checksum('**/*.py')[:16]}",
        "torch": torch.__version__,
    }
