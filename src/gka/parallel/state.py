"""The state of a training run as a sharded checkpoint, on torch.distributed.checkpoint (DCP).

Every rank writes its own part of each parameter and of each of the optimizer's tensors, under the
parameter's name. The tensors' metadata holds whole shapes, so any other number of ranks, and any other mesh,
reads them back: each rank reads the parts that it needs.
"""

import errno
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from gka.errors import InputError
from gka.parallel.job import Job, current
from gka.parallel.sharding import reshard
from gka.storage import disk_reason

METADATA = ".metadata"
"""The file that makes a folder a sharded checkpoint."""
_MODEL, _OPTIMIZER = "model.", "optimizer."
State = dict[str, Tensor]


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what `save_state` writes."""
    return (folder / METADATA).is_file()


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the parameters and the optimizer's tensors; every rank of the job calls it.

    Args:
        folder: on storage that all ranks share.
        model: the model, parallelised or not.
        optimizer: its optimizer.

    Raises:
        OSError: on every rank, if one of them cannot write; the message has its rank.
    """
    write_state(folder, state_of(model, optimizer), current())


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The parameters and the optimizer's tensors, by the names that a checkpoint has for them."""
    found = {_MODEL + name: tensor.detach() for name, tensor in _tensors(model)}
    return found | _optimizer_tensors(model, optimizer)


class Staging:
    """Copies of a state on the CPU, so that training may go on while they are written.

    Args:
        pinned: whether to keep the copies' memory, page-locked, for the next state; for states on a GPU.
    """

    def __init__(self, pinned: bool) -> None:
        self._stager = BlockingAsyncStager(cache_staged_state_dict=pinned)

    def copies(self, state: State) -> State:
        """The state's copies; with `pinned` the next ones take their place."""
        return self._stager.stage(state)


def write_state(folder: Path, state: State, job: Job) -> None:
    """Write a state; every rank of the job calls it, in `job.control`.

    Raises:
        OSError: on every rank, if one of them cannot write; the message has its rank.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        try:
            dcp.save(state, storage_writer=writer, **_group(job))
        except dcp.CheckpointException as error:  # a BaseException
            raise _first_failure(error, job) from error


def _first_failure(error: dcp.CheckpointException, job: Job) -> Exception:
    """What failed on the first of the ranks where something did."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    where = f" (rank {rank})" if job.ranks > 1 else ""
    if isinstance(cause, Exception) and (reason := disk_reason(cause)) is not None:
        return OSError(getattr(cause, "errno", None) or errno.EIO, f"{reason}{where}")
    return RuntimeError(f"{type(cause).__name__}: {cause}{where}")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Read what `save_state` wrote, on any number of ranks, into the model and the optimizer in place.

    Raises:
        InputError: the checkpoint is of a model with other parameters or sizes; the message names one.
    """
    reader = dcp.FileSystemReader(folder)
    there = reader.read_metadata().state_dict_metadata
    state = {_MODEL + name: tensor.detach() for name, tensor in _tensors(model)}
    _check_same(folder, there, state)
    if optimizer is not None:
        _fill_optimizer(model, optimizer, there)
        state |= _optimizer_tensors(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # one process
        dcp.load(state, storage_reader=reader, **_group(current()))


def _group(job: Job) -> dict[str, Any]:
    if job.ranks == 1 and not dist.is_initialized():
        return {"no_dist": True}
    return {"process_group": job.control}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and buffers that belong to a checkpoint."""
    reshard(model)
    yield from model.named_parameters()
    stored = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in stored:
            yield name, buffer


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{_OPTIMIZER}{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _fill_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, there: dict[str, Any]
) -> None:
    """Give the optimizer zeros for every tensor that the checkpoint has of it."""
    for name, parameter in model.named_parameters():
        prefix = f"{_OPTIMIZER}{name}."
        for path, stored in there.items():
            if not path.startswith(prefix) or not isinstance(stored, TensorStorageMetadata):
                continue
            dtype = stored.properties.dtype
            if tuple(stored.size) == tuple(parameter.shape):
                empty = torch.zeros_like(parameter, dtype=dtype)
            else:  # a count of steps, which torch's optimizers keep on the CPU
                empty = torch.zeros(tuple(stored.size), dtype=dtype)
            optimizer.state[parameter][path.removeprefix(prefix)] = empty.detach()


def _check_same(folder: Path, there: dict[str, Any], state: dict[str, Tensor]) -> None:
    stored = {name: tuple(x.size) for name, x in there.items() if name.startswith(_MODEL)}
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(stored.keys() | ours.keys()):
        if stored.get(name) != ours.get(name):
            told = [f"of shape {list(x[name])}" if name in x else "absent" for x in (stored, ours)]
            raise InputError(
                f"{folder} is a checkpoint of another model: {name.removeprefix(_MODEL)} is {told[0]} there, "
                f"and {told[1]} in this run's model"
            )


def spread_optimizer_state(optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> None:
    """Load the state dict of a one-process optimizer, whose tensors are whole, into one of DTensors.

    Both optimizers must have been made in the same way, with parameters in the same order.

    Raises:
        InputError: they have other numbers of parameters, or parameters of other shapes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) != sum(len(group["params"]) for group in whole["param_groups"]):
        raise InputError("the optimizer's state is of another model: it has other parameters")
    for index, state in whole["state"].items():
        parameter = parameters[index]
        for key, value in state.items():
            optimizer.state[parameter][key] = _like(value, parameter)
    for group, stored in zip(optimizer.param_groups, whole["param_groups"], strict=True):
        group.update({key: value for key, value in stored.items() if key != "params"})


def _like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape:
        raise InputError(
            f"the optimizer's state is of another model: {list(value.shape)} beside a parameter of "
            f"{list(parameter.shape)}"
        )
    return spread(value, parameter)


def spread(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, on a parameter's device and, if that is a DTensor, mesh."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def spread_weights(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Load whole tensors, by the names of the model's state dict, into its DTensors.

    Raises:
        InputError: a parameter is missing or of another shape.
    """
    for name, parameter in _tensors(model):
        value = whole.get(name)
        if value is None or value.shape != parameter.shape:
            found = "missing" if value is None else f"of shape {list(value.shape)}"
            raise InputError(f"the checkpoint is of another model: {name} is {found}")
        parameter.copy_(_like(value, parameter))


def _whole(tensor: DTensor) -> Tensor:
    """All of a DTensor, gathered over one dimension of its mesh after the other."""
    placements = list(tensor.placements)
    for dim in range(len(placements)):
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a parallelised model, on the CPU of rank 0; every rank calls it.

    Tied parameters have all their names. Other ranks get {}.
    """
    main, found = current().is_main, {}
    reshard(model)
    for name, tensor in model.state_dict().items():
        whole = _whole(tensor) if isinstance(tensor, DTensor) else tensor
        if main:
            found[name] = whole.to("cpu")
    return found
