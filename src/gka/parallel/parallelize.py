"""`parallelize`: a model on a mesh, for `gka train` and for loops of your own."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gka.parallel.mesh import CONTEXT, REPLICATE, SHARD, TENSOR, layout_of
from gka.parallel.sharding import shard_blocks
from gka.parallel.tensor import split_tensors


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """doc later"""
    layout = layout_of(mesh)
    if layout.tp > 1:
        split_tensors(model, mesh[TENSOR])
    if layout.ranks > layout.tp or dtype is not None:
        shard_blocks(model, data_mesh(mesh), dtype, reshard_after_forward)
    return model


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The dimensions over which parameters are replicated and sharded; cp ranks share parameters like dp_shard."""
    layout = layout_of(mesh)
    shards = mesh[SHARD]
    if layout.cp > 1:
        shards = mesh[SHARD, CONTEXT]._flatten("dp_shard_cp")
        if layout.dp_replicate > 1:
            return mesh[REPLICATE, "dp_shard_cp"]
        return shards
    if layout.dp_replicate > 1:
        return mesh[REPLICATE, SHARD]
    return shards
