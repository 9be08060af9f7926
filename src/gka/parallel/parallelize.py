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
    """Put a model on a mesh, in place: its layers' heads over `tp`, its parameters over the other dimensions.

    Every rank passes the same model, from the same seed or file, or one on the meta device
    (`with torch.device("meta")`); the latter then gets its weights by `materialize` or `load_state`. All
    parameters become DTensors of one mesh, so that torch's optimizers take them as they are. Make the
    optimizer afterwards, with `gka.layers.parameter_groups`.

    Gradients are averaged over all dimensions but `tp`: multiply a rank's share of a summed loss by their
    product. Ranks that differ in `tp` alone must get the same rows. Clip with `clip_grad_norm_`.

    Args:
        model: a `GKAModel` or `GKAForCausalLM` on this rank's device, or on the meta device.
        mesh: dimensions with the names of `gka.parallel.Layout`, in its order; from `make_mesh`.
        dtype: torch.bfloat16: matrices are gathered and multiplied in it, and the model's calls run under
            torch.autocast; parameters, optimizer, decay rates, norms and gradient sums stay float32. None:
            everything in the parameters' dtype.
        reshard_after_forward: whether a layer's gathered matrices are freed until its backward pass.

    Returns:
        The model.

    Raises:
        InputError: the mesh has other dimensions, or heads or columns that do not divide among `tp` ranks.
    """
    layout = layout_of(mesh)
    if layout.tp > 1:
        split_tensors(model, mesh[TENSOR])
    if layout.ranks > layout.tp or dtype is not None:
        shard_blocks(model, data_mesh(mesh), dtype, reshard_after_forward)
    return model


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The dimensions over which parameters are replicated and sharded; cp ranks share them like dp_shard."""
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
