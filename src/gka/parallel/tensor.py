"""Tensor parallelism by heads: every rank of a group has a part of each layer's heads and MLP columns.

A mixer's projections of queries, keys, values and gates, its convolutions and decay rates are split by heads,
its output projection by the heads it reads. Between the two everything belongs to one head, so the memory
and all kernels run on this rank's heads as if there were no others. An MLP is split by its columns.

    x --(copy; gradients are summed)--> this rank's heads or columns --(results are summed)--> output

Parameters become DTensors on the group's mesh, so that optimizers, clipping and checkpoints see whole ones.
Modules compute with their local parts: `_with_local_parameters` puts these in place for a call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from gka.errors import InputError
from gka.layers import SoftmaxAttention
from gka.layers.parts.modules import ShortConvolution
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models.decoder import GKAMLP, GKADecoderLayer
from gka.parallel.exchanges import copied, summed
from gka.parallel.vocabulary import split_vocabulary

_HEADS = ("num_heads", "num_k_heads", "num_v_heads", "num_kv_heads", "num_expanded_heads")
# Projections whose columns belong to the mixer's expanded heads: gates.
_GATES = ("a_proj", "b_proj", "alpha_proj", "g_proj", "A_log", "dt_bias")


@dataclass(frozen=True)
class Share:
    """How a group's ranks share a parameter.

    Attributes:
        placement: of the DTensor on the group's mesh.
        partial: whether each rank's gradient is only a term of the whole.
        part: rows of a replicated parameter that this rank computes with; None for all.
        first: whether only the group's first rank adds it (a bias after the sum over ranks).
    """

    placement: Placement
    partial: bool = False
    part: slice | None = None
    first: bool = False


ROWS, COLUMNS = Share(Shard(0)), Share(Shard(1))
SAME = Share(Replicate())  # every rank computes the same with it
SUMMED = Share(Replicate(), partial=True)
BIAS = Share(Replicate(), partial=True, first=True)


def split_tensors(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split a `GKAModel` or `GKAForCausalLM` over the ranks of a one-dimensional mesh, in place.

    Every rank must hold the same weights, or all weights on the meta device. The input and the output of
    every layer are whole on every rank, and so are norms. Embedding and output head are split by words if
    the ranks divide the vocabulary.

    Args:
        model: the model.
        mesh: the group, `mesh["tp"]`.

    Raises:
        InputError: heads or columns do not divide among the ranks, or a layer cannot be split.
    """
    if (why := why_unsplit(model, mesh.size())) is not None:
        raise InputError(f"tp = {mesh.size()}: {why}")
    for layer in model.modules():
        if isinstance(layer, GKADecoderLayer):
            split_layer(layer, mesh)
    words = split_vocabulary(model, mesh)
    split_parameters(model, mesh, {
        name: ROWS if name in words else SAME
        for name, p in model.named_parameters(remove_duplicate=False)
        if not isinstance(p, DTensor)
    })  # fmt: skip


def split_layer(layer: GKADecoderLayer, mesh: DeviceMesh) -> None:
    """Split one layer, in place; its input and output are whole on every rank.

    Raises:
        InputError: the layer cannot be split.
    """
    plan = _plan(layer, mesh)
    _count_local_heads(layer.mixer, mesh)
    for part in (layer.mixer, layer.mlp):
        _sum_outputs(part, mesh)
    split_parameters(layer, mesh, plan)


def split_parameters(module: nn.Module, mesh: DeviceMesh, plan: dict[str, Share]) -> None:
    """Make a module's planned parameters DTensors, and let its calls see this rank's part of them."""
    _distribute(module, mesh, plan)
    _with_local_parameters(module, mesh, plan)


def why_unsplit(model: nn.Module, ranks: int) -> str | None:
    """Why the model cannot be split over that many ranks; None if it can."""
    layers = [layer for layer in model.modules() if isinstance(layer, GKADecoderLayer)]
    if not layers:
        return f"{type(model).__name__} has no decoder layers of this library"
    faults = ((number, _fault(layer, ranks)) for number, layer in enumerate(layers))
    found = (f"layer {number} cannot be split: {fault}" for number, fault in faults if fault)
    return next(found, None)


def _fault(layer: GKADecoderLayer, ranks: int) -> str | None:
    mixer: Any = layer.mixer
    if not isinstance(mixer, RecurrentMixer | SoftmaxAttention):
        return f"{type(mixer).__name__} has no heads to split"
    if not isinstance(layer.mlp, GKAMLP):
        return "experts are not split by tensor parallelism; use dp_shard"
    if mixer.q_proj.weight.shape[1] != mixer.hidden_size:
        return "its projections are no plain matrices"
    if all_heads(mixer) % ranks:
        return f"{all_heads(mixer)} heads do not divide among tp = {ranks} ranks"
    for name, count in _counts(mixer).items():
        if count % ranks and ranks % count:
            return f"{count} {name} heads neither divide among tp = {ranks} ranks nor divide it"
    columns = layer.mlp.gate_proj.weight.shape[0]
    if columns % ranks:
        return f"intermediate_size = {columns} does not divide among tp = {ranks} ranks"
    return None


def all_heads(mixer: Any) -> int:
    """Heads of a mixer's output."""
    return getattr(mixer, "num_expanded_heads", mixer.num_heads)


def _counts(mixer: Any) -> dict[str, int]:
    if isinstance(mixer, SoftmaxAttention):
        return {"query": mixer.num_heads, "key and value": mixer.num_kv_heads}
    counts = {"query": mixer.num_heads, "key": mixer.num_k_heads, "value": mixer.num_v_heads}
    return {n: c for n, c in counts.items() if n == "query" or not hasattr(mixer, "k_expand")}


def _plan(layer: GKADecoderLayer, mesh: DeviceMesh) -> dict[str, Share]:
    """The share of every parameter of a layer.

    Raises:
        InputError: the layer cannot be split.
    """
    if (fault := _fault(layer, mesh.size())) is not None:
        number = getattr(layer.mixer, "layer_idx", None)
        raise InputError(f"tp = {mesh.size()}: layer {number} cannot be split: {fault}")
    plan = {}
    for name, _ in layer.named_parameters():
        part, _, rest = name.partition(".")
        if part == "mixer":
            plan[name] = _of_mixer(layer.mixer, rest, mesh)
        elif part == "mlp":
            plan[name] = COLUMNS if rest.startswith("down_proj") else ROWS
        else:
            plan[name] = SAME
    return plan


def _of_mixer(mixer: Any, name: str, mesh: DeviceMesh) -> Share:
    """The share of a mixer's parameter, by its name in the mixer."""
    module, _, kind = name.partition(".")
    if module == "o_proj":
        return COLUMNS if kind == "weight" else BIAS
    if module in _GATES or kind in ("up.weight", "mix"):
        return ROWS
    if module in ("q_norm", "k_norm", "o_norm") or module.endswith("_expand"):
        return SUMMED
    if module == "sketch_map":
        return _of_heads(mixer.sketch_map.weight.shape[0], 1, mesh)
    letter = module[0]  # q_proj, k_conv1d, ...
    if letter != "q" and hasattr(mixer, "k_expand"):
        return SUMMED  # the learned expansion reads all of its few heads
    if isinstance(mixer, SoftmaxAttention):
        heads, width = mixer.num_heads if letter == "q" else mixer.num_kv_heads, mixer.head_dim
    else:
        heads = {"q": mixer.num_heads, "k": mixer.num_k_heads, "v": mixer.num_v_heads}[letter]
        width = mixer.head_v_dim if letter == "v" else mixer.head_dim
    return _of_heads(heads, width, mesh)


def _of_heads(heads: int, width: int, mesh: DeviceMesh) -> Share:
    """The share of a parameter with `width` rows a head: this rank's heads, or the one that they share."""
    if heads % mesh.size() == 0:
        return ROWS
    head = mesh.get_local_rank() * heads // mesh.size()
    return Share(Replicate(), partial=True, part=slice(head * width, (head + 1) * width))


def _distribute(module: nn.Module, mesh: DeviceMesh, plan: dict[str, Share]) -> None:
    """Replace the planned parameters by DTensors; parameters that are tied stay so."""
    made: dict[int, nn.Parameter] = {}
    for name, share in plan.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        whole: Any = getattr(owner, last)
        if id(whole) not in made:
            spread = distribute_tensor(whole.detach(), mesh, [share.placement], src_data_rank=None)
            if not whole.is_meta and not isinstance(share.placement, Replicate):
                # a copy of the part, so that the whole can be freed
                local = spread.to_local().clone(memory_format=torch.contiguous_format)
                spread = DTensor.from_local(local, mesh, [share.placement], run_check=False)
            made[id(whole)] = nn.Parameter(spread, requires_grad=whole.requires_grad)
        setattr(owner, last, made[id(whole)])


def _count_local_heads(mixer: Any, mesh: DeviceMesh) -> None:
    """Let a mixer count this rank's heads, and its convolutions their channels."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    whole, expands = all_heads(mixer), hasattr(mixer, "k_expand")
    for name in _HEADS:
        kept = expands and name in ("num_k_heads", "num_v_heads")
        if hasattr(mixer, name) and not kept:
            setattr(mixer, name, max(1, getattr(mixer, name) // ranks))
    local = whole // ranks
    for module in mixer.children():
        if hasattr(module, "head_range"):
            module.head_range = slice(rank * local, (rank + 1) * local)
    if isinstance(mixer, RecurrentMixer):
        heads = (mixer.num_heads, mixer.num_k_heads, mixer.num_v_heads)
        dims = (mixer.head_dim, mixer.head_dim, mixer.head_v_dim)
    elif isinstance(mixer, SoftmaxAttention):
        heads = (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads)
        dims = (mixer.head_dim,) * 3
    else:
        return
    for letter, count, dim in zip("qkv", heads, dims, strict=True):
        convolution = getattr(mixer, f"{letter}_conv1d", None)
        if isinstance(convolution, ShortConvolution):
            convolution.channels = count * dim


def _sum_outputs(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let a module's output be the sum over ranks, and its input's gradient too."""
    forward: Callable[..., Any] = module.forward

    @wraps(forward)
    def shared(x: Tensor, *others: Any, **options: Any) -> Any:
        found = forward(copied(x, mesh), *others, **options)
        if isinstance(found, tuple):
            return summed(found[0], mesh), *found[1:]
        return summed(found, mesh)

    module.forward = shared


def _with_local_parameters(module: nn.Module, mesh: DeviceMesh, plan: dict[str, Share]) -> None:
    """Let a module's calls see this rank's plain tensors in place of the planned DTensors."""
    forward: Callable[..., Any] = module.forward

    @wraps(forward)
    def local(*args: Any, **options: Any) -> Any:
        with local_parameters(module, mesh, plan):
            return forward(*args, **options)

    module.forward = local


@contextmanager
def local_parameters(module: nn.Module, mesh: DeviceMesh, plan: dict[str, Share]) -> Iterator[None]:
    """This rank's part of each planned parameter in its place; the DTensors return at the end."""
    owners: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    for name, share in plan.items():
        path, _, last = name.rpartition(".")
        parameters: dict[str, Any] = module.get_submodule(path)._parameters
        whole: Any = parameters[last]
        if not isinstance(whole, DTensor):
            continue  # an enclosing module's call has done so
        owners.append((parameters, last, whole))
        if id(whole) not in made:
            made[id(whole)] = _local(whole, share, mesh)
        parameters[last] = made[id(whole)]
    try:
        yield
    finally:
        for parameters, last, whole in owners:
            parameters[last] = whole


def _local(whole: DTensor, share: Share, mesh: DeviceMesh) -> Tensor:
    local = whole.to_local()
    if share.partial:
        local = copied(local, mesh)
    if share.part is not None:
        local = local[share.part]
    return local * (mesh.get_local_rank() == 0) if share.first else local
