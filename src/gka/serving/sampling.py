"""Which token comes next: the likeliest, or a draw from the likely ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most this many tokens are added.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: sample from this many likeliest tokens; 0 from all.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the random numbers; None goes on with torch's own.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if 0 < self.temperature < 1e-30:  # logits divided by it leave float32
            raise InputError(
                f"temperature is {self.temperature}; expected 0 (greedy), or 1e-30 or more"
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; expected a number from 0 to {2**64 - 1}")


def chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function from logits [B,V] to next tokens [B], int64; it holds the random numbers' state."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    process = _processors(sampling)
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> Tensor:
        # these processors look at the logits alone, whatever tokens came before
        nothing = torch.empty(logits.shape[0], 0, dtype=torch.long, device=logits.device)
        probabilities = process(nothing, logits.float()).softmax(-1)
        try:
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        except RuntimeError as error:  # on a CPU it looks
            raise InputError(
                "the next token has no probabilities, its logits are not finite: the weights, or the states "
                f"gone on from, are damaged ({str(error).splitlines()[0]})"
            ) from None

    return draw


def _processors(sampling: Sampling) -> Any:
    """transformers' own, in the order that `generate` applies them in."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors
