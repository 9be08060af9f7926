"""The mesh of a job: how many ranks replicate, shard, split heads and sequences, and who reads which rows.

Ranks count through the mesh with the last dimension fastest: (dp_replicate, dp_shard, cp, tp), so that the
ranks of one tensor-parallel group, which exchange most, are neighbours.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gka.errors import InputError

REPLICATE, SHARD, CONTEXT, TENSOR = "dp_replicate", "dp_shard", "cp", "tp"
NAMES = (REPLICATE, SHARD, CONTEXT, TENSOR)


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension of the mesh.

    Attributes:
        dp_replicate: copies of the model, each trained on its own rows; gradients are summed over them.
        dp_shard: ranks that hold a share of every parameter each, and read rows of their own (FSDP2).
        cp: ranks that share one sequence, each with a part of its tokens.
        tp: ranks that share one layer, each with a part of its heads.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def fitted(
        cls, ranks: int, dp_replicate: int = 1, dp_shard: int = 0, cp: int = 1, tp: int = 1
    ) -> "Layout":
        """The layout of that many ranks; dp_shard = 0 takes all ranks that the others leave.

        Raises:
            InputError: the product is not the number of ranks; the message has both.
        """
        rest = dp_replicate * cp * tp
        if dp_shard == 0 and rest <= ranks and ranks % rest == 0:
            dp_shard = ranks // rest
        layout = cls(dp_replicate, dp_shard, cp, tp)
        if layout.ranks != ranks:
            asked = f"{REPLICATE} = {dp_replicate}, {CONTEXT} = {cp}, {TENSOR} = {tp}"
            asked += f", {SHARD} = {dp_shard}" if dp_shard else ""
            need = f"need {layout.ranks} ranks" if dp_shard else f"need a multiple of {rest} ranks"
            raise InputError(
                f"[parallel]: {asked} {need}, and the job has {ranks}: change these numbers, or start "
                "another number of processes (torchrun --nproc-per-node)"
            )
        return layout

    @property
    def ranks(self) -> int:
        """Processes of the job."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks along each dimension, in the order of `NAMES`."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def readers(self) -> int:
        """Groups of ranks that read different rows; the tp and cp ranks of a group read the same ones."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks among which each parameter's memory is shared, besides tp: FSDP2 over dp_shard x cp."""
        return self.dp_shard * self.cp

    def reader(self, rank: int) -> int:
        """Which of `readers` a rank belongs to."""
        return rank // (self.cp * self.tp)

    def __str__(self) -> str:
        return " x ".join(f"{n} {s}" for n, s in zip(NAMES, self.sizes, strict=True) if s > 1)


def device_type() -> str:
    """ "cuda" where torch has a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_mesh(layout: Layout, device: str | None = None) -> DeviceMesh:
    """The mesh of all ranks, with the dimensions `NAMES`; those of one rank are part of it too.

    Args:
        layout: ranks along each dimension.
        device: "cuda" or "cpu". None: `device_type()`.

    Raises:
        InputError: the process group has another number of ranks, or there is none.
    """
    if not dist.is_initialized():
        raise InputError(
            "a mesh needs a process group: start the program with torchrun, and call "
            "torch.distributed.init_process_group or gka.parallel.start() first"
        )
    Layout.fitted(dist.get_world_size(), *layout.sizes)
    return init_device_mesh(device or device_type(), layout.sizes, mesh_dim_names=NAMES)


def layout_of(mesh: DeviceMesh) -> Layout:
    """The layout of a mesh; dimensions that it lacks have one rank.

    Raises:
        InputError: a dimension has another name than `NAMES`.
    """
    names: Any = mesh.mesh_dim_names or ()
    strange = [name for name in names if name not in NAMES]
    if strange or not names:
        raise InputError(
            f"mesh: expected dimensions named {', '.join(NAMES)} (each may be absent), got "
            f"{', '.join(map(str, names)) or 'none'}"
        )
    return Layout(**{name: mesh[name].size() for name in names})
