"""Rotary wavelengths, scaled in the ways that transformers knows."""

import math
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gka.errors import InputError
from gka.models.fields import GKAFields

ROPE_TYPES = ("linear", "yarn", "llama3")
"""Scalings that do not depend on the length at hand, as `dynamic` and `longrope` do."""


def rotary_frequencies(config: GKAFields, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Angles a position [head_dim / 2], and the factor of rotated vectors, of `config.rope_options`."""
    options = dict(config.rope_options or {})
    with torch.device("cpu"):  # models are also constructed on the meta device, without numbers
        return _frequencies(config, options, head_dim)


def _frequencies(
    config: GKAFields, options: dict[str, Any], head_dim: int
) -> tuple[tuple[float, ...], float]:
    carrier = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=options | {"rope_theta": config.rope_theta},
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[options["rope_type"]](carrier, "cpu")
    return tuple(inv_freq.tolist()), float(factor)


def check_rope(config: GKAFields) -> None:
    """Raise `InputError` if `rope_options` names no known scaling, or lacks its numbers."""
    if config.rope_options is None:
        return
    kind = config.rope_options.get("rope_type")
    if kind not in ROPE_TYPES:
        raise InputError(
            f"rope_options: rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}"
        )
    try:
        frequencies, factor = rotary_frequencies(config, 8)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"rope_options of type {kind!r}: {error}") from error
    if not all(map(math.isfinite, (*frequencies, factor))):
        raise InputError(f"rope_options of type {kind!r}: their numbers give no finite angles")
