"""How weights start, in the way transformers asks for it."""

from typing import Any

import torch
from torch import nn
from transformers import initialization

from gka.layers.parts.expansion import ZeroLinear


@torch.no_grad()
def init_module(module: nn.Module, *, std: float) -> None:
    """Initialise the module's own parameters, except those that a checkpoint has just filled.

    Matrices, embeddings and experts are normal with deviation `std`, biases zero. Everything else (decay
    rates, convolutions, norms) knows its own start and draws it in `reset_parameters`.

    transformers calls this after construction and, when loading, for what a checkpoint lacks; by then the
    values drawn in the constructor are gone, since models are constructed without memory.
    """
    if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, ZeroLinear):
        initialization.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            initialization.zeros_(module.bias)
        return
    if getattr(module, "starts_normal", False):
        for parameter in module.parameters(recurse=False):
            initialization.normal_(parameter, mean=0.0, std=std)
        return
    own: Any = list(module.parameters(recurse=False))
    filled = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
    if len(filled) == len(own):
        return
    if not callable(reset := getattr(module, "reset_parameters", None)):
        raise NotImplementedError(
            f"{type(module).__name__} has parameters but no reset_parameters()"
        )
    reset()
    for parameter, value in filled:
        parameter.copy_(value)
