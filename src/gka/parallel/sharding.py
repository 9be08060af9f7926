"""Fully sharded data parallelism by block, on torch's FSDP2.

Each decoder layer is one group: its matrices are gathered before its forward and backward pass, and their
gradients are reduced after it. All small parameters (decay rates, norms, convolutions, biases) belong to the
model's own group, with embedding and output head. A group has one dtype, and these stay float32 where the
matrices are gathered in bfloat16: rounding `A_log` and `dt_bias` would compound over a sequence.
"""

from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gka.models.decoder import GKADecoderLayer


def shard_blocks(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a `GKAModel` or `GKAForCausalLM` over a mesh, in place.

    Args:
        model: the model, the same on every rank or on the meta device.
        mesh: one dimension (shards) or two (replicas, shards).
        dtype: in which the layers' matrices are gathered and multiplied; the model then runs under
            torch.autocast, and gradients are reduced in float32. None: the parameters' own.
        reshard_after_forward: whether a layer's matrices are freed after its forward pass.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GKADecoderLayer)]
    matrices = {p for layer in layers for p in layer.parameters() if p.ndim == 2}
    own = {p for p in model.parameters() if p not in matrices}
    # The model first: a group takes no parameters of modules that are groups already.
    fully_shard(model, mesh=mesh, ignored_params=matrices)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype is not None:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    sharded = set(model.parameters()) - matrices
    assert len(sharded) == len(own)
    for layer in layers:
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, ignored_params=sharded,
            reshard_after_forward=reshard_after_forward,
        )  # fmt: skip
    if dtype is not None:
        autocast(model, mesh.device_type, dtype)


def autocast(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Let a model's calls run under torch.autocast."""
    forward = model.forward

    @wraps(forward)
    def cast(*args: Any, **options: Any) -> Any:
        with torch.autocast(device, dtype):
            return forward(*args, **options)

    model.forward = cast


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that `model.parameters()` are the sharded ones.

    A forward pass without a backward pass leaves the model's own group gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
