"""First weights of a model that was made and parallelised without memory."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gka.models.decoder import init_module
from gka.parallel.state import spread


@torch.no_grad()
def materialize(model: Any, device: torch.device | str, seed: int = 0) -> None:
    """Give memory and first weights to a model that was parallelised on the meta device.

    One module's whole parameters exist at a time, on the CPU of each rank, and every rank draws the same
    numbers: the weights depend on the seed alone, not on the mesh. They are distributed as, but not equal to,
    those of a model made with memory.

    Args:
        model: a `GKAModel` or `GKAForCausalLM` after `parallelize`.
        device: of this rank.
        seed: of the weights. The process's own generator is left as it was.
    """
    model.to_empty(device=device)
    done: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in done}
            done |= {id(p) for p in own.values()}
            if own:
                for name, value in _drawn(module, own, model.config.initializer_range).items():
                    own[name].copy_(spread(value, own[name]))


def _drawn(module: nn.Module, own: dict[str, Any], std: float) -> dict[str, Tensor]:
    """Whole first values of a module's own parameters."""
    whole = copy.copy(module)
    drawn = {n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for n, p in own.items()}
    whole._parameters = {**module._parameters, **drawn}
    init_module(whole, std=std)
    return {name: value.detach() for name, value in drawn.items()}
