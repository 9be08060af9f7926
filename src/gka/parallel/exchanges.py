"""What ranks that share a layer exchange, with gradients: copies, sums and columns."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def copied(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, the same on every rank, for different work on each; its gradients are summed over the ranks."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(
        grad_placements=[Partial()]
    )


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of every rank's x, the same on every rank."""
    partial = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return partial.redistribute(placements=[Replicate()]).to_local()


def joined_columns(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Every rank's columns x [...,own] side by side, the same on every rank.

    Gradients must be the same on every rank, which takes those of its own columns.
    """
    spread = DTensor.from_local(x, mesh, [Shard(x.ndim - 1)], run_check=False)
    return spread.redistribute(placements=[Replicate()]).to_local()
