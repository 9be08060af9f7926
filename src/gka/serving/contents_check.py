"""Whether named tensors are what a session of a model holds: all that a state file may be forged in."""

from typing import Any

import torch
from torch import Tensor

from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models import GKAForCausalLM, state_shapes

_MOST = 2**40  # tokens and rows; beyond, products of sizes leave the range of 64 bits
_HALF = {torch.bfloat16, torch.float16}


def why_not(
    model: GKAForCausalLM, header: dict[str, Any], tensors: dict[str, Tensor]
) -> str | None:
    """Why they cannot be the states of `model`; None if they can. No number is looked at.

    Args:
        model: whose states they are said to be.
        header: with `tokens`, `batch_size` (0 before the first token) and `tracks_decay`.
        tensors: named as by `Contents.named`.
    """
    for name in ("tokens", "batch_size"):
        count = header.get(name)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < _MOST:
            return f"{name} is {count!r:.40}; expected a whole number from 0 on"
    tokens, rows, tracked = header["tokens"], header["batch_size"], header.get("tracks_decay")
    if not isinstance(tracked, bool):
        return f"tracks_decay is {tracked!r:.40}; expected true or false"
    if (tokens == 0) != (rows == 0):
        return f"{tokens} tokens in {rows} rows"
    needed, optional = _shapes(model, rows, tokens, tracked)
    missing = [name for name in needed if name not in tensors]
    if missing:
        return f"it needs {_some(missing)}, which the file lacks"
    surplus = [name for name in tensors if name not in needed and name not in optional]
    if surplus:
        return f"it has no place for {_some(surplus)}"
    for name, x in tensors.items():
        shape, dtypes = (needed | optional)[name], _dtypes(name, model.dtype)
        if tuple(x.shape) != shape:
            return f"{name} has shape {tuple(x.shape)}; expected {shape}"
        if x.dtype not in dtypes:
            shown = " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            return f"{name} is {str(x.dtype).removeprefix('torch.')}; expected {shown}"
    return None


def why_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Which tensor holds NaN or infinity; None if none does."""
    for name, x in tensors.items():
        if not bool(x.isfinite().all()):
            return f"{name} holds numbers that are not finite"
    return None


def _shapes(
    model: GKAForCausalLM, rows: int, tokens: int, tracked: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of what must be there, and of what may."""
    if tokens == 0:
        return {}, {}
    needed, optional = (
        state_shapes(model, rows, tokens),
        {"logits": (rows, model.config.vocab_size)},
    )
    mixers = [layer.mixer for layer in model.model.layers]
    if not all(isinstance(mixer, RecurrentMixer) for mixer in mixers):
        optional["mask"] = (rows, tokens)
    for index, mixer in enumerate(mixers):
        if tracked and isinstance(mixer, RecurrentMixer) and mixer.use_forgetting_gate:
            needed[f"log_decay.{index}"] = (rows, mixer.num_expanded_heads)
    return needed, optional


def _dtypes(name: str, dtype: torch.dtype) -> set[torch.dtype]:
    """Recurrent states are float32 or better; the others have the model's dtype, or autocast's."""
    if name == "mask":
        return {torch.bool}
    if name.startswith("log_decay."):
        return {torch.float64}
    if ".recurrent." in name:
        return {torch.float64 if dtype == torch.float64 else torch.float32}
    return {dtype} if dtype in _HALF else {dtype} | _HALF


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name:.40}" for name in sorted(names)[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
