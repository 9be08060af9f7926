"""The Trainer of a parallelised model: it prepares, counts, clips, saves and loads what a mesh shards.

Everything else (steps, logging, evaluation, callbacks, resuming) is the Trainer's own, one path for one
process and for many.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gka.errors import InputError
from gka.foreign_code import read_state
from gka.models import GKAForCausalLM
from gka.parallel import ContextParallel, Layout, clip_grad_norm_, current
from gka.parallel.mesh import CONTEXT
from gka.parallel.state import (
    is_sharded_checkpoint,
    load_state,
    save_state,
    spread_optimizer_state,
    spread_weights,
)
from gka.training import checkpoints
from gka.training.order import targets_of
from gka.training.saving import BackgroundSaves
from gka.training.trainer import DecoderTrainer

GROUPS, SCHEDULER, OPTIMIZER = "groups.pt", "scheduler.pt", "optimizer.pt"


class MeshTrainer(DecoderTrainer):
    """Trainer of a model that `gka.parallel.parallelize` has put on a mesh, or of one process's model.

    Checkpoints are sharded (`gka.parallel.state`), and those of other numbers of ranks, of one process too,
    are read.

    Args:
        layout: of the mesh.
        mesh: where the model is; None for one process.
        saves: write checkpoints in the background. None: training waits until they are written.
        settings: the Trainer's arguments.
    """

    def __init__(
        self,
        layout: Layout,
        mesh: DeviceMesh | None,
        saves: BackgroundSaves | None,
        **settings: Any,
    ) -> None:
        self.layout, self.saves = layout, saves
        self.sharing = mesh[CONTEXT] if mesh is not None and layout.cp > 1 else None
        # accelerate leaves a prepared model as it is; else it would wrap it in DDP
        settings["model"]._is_accelerate_prepared = True
        super().__init__(**settings)

    @property
    def readers(self) -> tuple[int, int]:
        """Groups of ranks that read different blocks, and this rank's one."""
        return self.layout.readers, self.layout.reader(current().rank)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the model is where its mesh is."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, and the number of targets in those of all readers."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        sharing = self.layout.ranks // self.layout.readers
        total = current().sum(sum(map(targets_of, batches))) // sharing
        return batches, torch.tensor(total, device=device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss; in training times the readers over which gradients are averaged.

        So gradients are sums, and the mean over ranks that is logged is the loss of the global batch. Ranks
        that share sequences have their common loss, whose gradients are to be averaged too.
        """
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            loss = loss * self.layout.readers
        return (loss, outputs) if return_outputs else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # before the tokens are on a device, where bounds would have to be read
        return super()._prepare_inputs(self.part_of(inputs))

    def part_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What this rank gives to its model of its reader's batch, which all ranks of a reader get.

        With cp > 1 its tokens, and a context that holds the rows' documents and padding.
        """
        if self.sharing is None:
            return inputs
        facts = {name: inputs.get(name) for name in ("cu_seqlens", "attention_mask")}
        rest = {name: x for name, x in inputs.items() if name not in facts}
        length = rest["input_ids"].shape[1]
        context = ContextParallel.even(self.sharing, length, device=current().device, **facts)
        return {name: context.shard(x) for name, x in rest.items()} | {"context": context}

    def _evaluated_model(self) -> nn.Module:
        return self.model  # pyright: ignore[reportReturnType]

    def _of_all_readers(self, value: Any) -> list[Any]:
        every = current().gather(value)
        return every[:: self.layout.ranks // self.layout.readers]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = grad_norm
        if norm is None:
            norm = clip_grad_norm_(model.parameters(), float("inf"))
        if self.watch is not None:
            self.watch.norm = norm
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the sharded state of a checkpoint, and the tokenizer and configuration beside it.

        In the background the state is only copied here, and `SealCheckpoints` has it written.
        """
        folder = Path(str(output_dir))
        job, model, optimizer = current(), self.model, self._torch_optimizer()
        if self.saves is not None:
            self.saves.stage(model, optimizer)
        with job.together():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / checkpoints.UNFINISHED).touch()
        if self.saves is None:
            save_state(folder, model, optimizer)  # pyright: ignore[reportArgumentType]
        if job.is_main:
            model.config.save_pretrained(folder)  # pyright: ignore
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)  # pyright: ignore

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save on all ranks or on none: a full disk on one ends the run on all."""
        if self.saves is not None:
            self.saves.finish()  # before this save's own errors
        with current().together():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if current().is_main:
            groups = self._torch_optimizer().param_groups
            kept = [{k: v for k, v in group.items() if k != "params"} for group in groups]
            torch.save(kept, Path(output_dir) / GROUPS)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)  # pyright: ignore

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights; with a sharded checkpoint they come with the optimizer, which is made later."""
        folder, whole = Path(resume_from_checkpoint), self.model
        with checkpoints.loading(folder):
            if is_sharded_checkpoint(folder):
                load_state(folder, whole, None)  # pyright: ignore[reportArgumentType]
            else:
                spread_weights(whole, _whole_weights(folder, whole))  # pyright: ignore

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), self._torch_optimizer()
        with checkpoints.loading(folder):
            if is_sharded_checkpoint(folder):
                load_state(folder, self.model, optimizer)  # pyright: ignore[reportArgumentType]
                groups = read_state(folder / GROUPS)
                for group, stored in zip(optimizer.param_groups, groups, strict=True):
                    group.update(stored)
            else:
                stored = read_state(folder / OPTIMIZER)
                spread_optimizer_state(optimizer, stored)
            scheduler = read_state(folder / SCHEDULER)
            self.lr_scheduler.load_state_dict(scheduler)  # pyright: ignore

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)


def _whole_weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """The weights that a one-process run has saved."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    if not found:
        raise InputError(f"{folder} has no weights in safetensors files")
    return found


def on_mesh(
    layout: Layout, mesh: DeviceMesh | None, saves: BackgroundSaves | None = None
) -> Callable[..., MeshTrainer]:
    """`fit`'s argument `kind` for a model on a mesh of that layout; the rest as in `MeshTrainer`."""
    return partial(MeshTrainer, layout, mesh, saves)


def with_weights(config: Any, weights: dict[str, torch.Tensor]) -> GKAForCausalLM:
    """A model of plain tensors with these weights, which it does not copy."""
    with torch.device("meta"):
        model = GKAForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model
