"""The norm of gradients that lie on any mesh, and their clipping."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients of a model by min(1, max_norm / norm), as `torch.nn.utils.clip_grad_norm_` does.

    Works with plain tensors, DTensors of one mesh and of several. One all-reduce over all ranks of the job
    sums the squares, so every rank gets the same norm.

    Args:
        parameters: the model's; those without a gradient are left out.
        max_norm: largest norm that stays; math.inf only measures.

    Returns:
        The 2-norm of all gradients before clipping, a scalar in float32 (float64 for float64 gradients).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    spread = any(isinstance(gradient, DTensor) for gradient in gradients)
    ranks = dist.get_world_size() if spread else 1
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    wide = torch.promote_types(local[0].dtype, torch.float32)
    norms = [n.to(wide) for n in torch._foreach_norm(local)]
    squares = torch._foreach_mul(norms, norms)
    # Each rank's share of a square that several of them hold. As a tensor the numbers would have to be
    # copied to the device, and the copy would wait for all work before it.
    torch._foreach_div_(squares, [_copies(g, ranks) for g in gradients])
    total = torch.stack(squares).sum()
    if spread:
        dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm < math.inf:
        # as torch does: the factor is used even where it is 1, so that nothing waits for the device
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, factor.to(local[0].dtype))
    return norm


def _copies(gradient: Tensor, ranks: int) -> float:
    """How many ranks hold an element of a gradient."""
    if not isinstance(gradient, DTensor):
        return float(ranks)
    mesh = gradient.device_mesh
    held = math.prod(
        mesh.size(i) for i, p in enumerate(gradient.placements) if isinstance(p, Replicate)
    )
    return float(held * ranks // mesh.size())
