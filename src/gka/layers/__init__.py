"""Sequence mixers with one interface, and their parts. Torch only.

Every mixer has the same call and returns (output, None, cache):
`mixer(hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens, position_ids)`, or with
`context=` on a part of rows that are split over ranks.
"""

import inspect
from typing import Any

from torch import nn

from gka.layers.attention import SlidingWindowAttention, SoftmaxAttention
from gka.layers.delta_net import DeltaNet, GatedDeltaNet
from gka.layers.gated_kalmanet import GatedKalmaNet
from gka.layers.linear_attention import GatedLinearAttention
from gka.layers.parts.cache import StateCache
from gka.layers.parts.modules import (
    DECAY_PARAMETERS,
    GatedRMSNorm,
    RMSNorm,
    ShortConvolution,
    decayed_parameters,
    parameter_groups,
    rotate,
)

MIXERS: dict[str, type[nn.Module]] = {
    "gka": GatedKalmaNet,
    "attention": SoftmaxAttention,
    "swa": SlidingWindowAttention,
    "gla": GatedLinearAttention,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
}


def mixer_options(name: str) -> tuple[str, ...]:
    """Names of the mixer's constructor arguments.

    Raises:
        ValueError: there is no such mixer.
    """
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}: choose one of {', '.join(MIXERS)}")
    return tuple(inspect.signature(MIXERS[name]).parameters)


def build_mixer(name: str, **options: Any) -> nn.Module:
    """Construct a mixer by its name in `MIXERS`.

    Args:
        name: "gka", "attention", "swa", "gla", "deltanet" or "gated_deltanet".
        **options: the mixer's constructor arguments.

    Raises:
        ValueError: no such mixer, an option that it does not have, or values that do not fit.
    """
    known = mixer_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"mixer {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return MIXERS[name](**options)


__all__ = [
    "GatedKalmaNet",
    "SoftmaxAttention",
    "SlidingWindowAttention",
    "GatedLinearAttention",
    "DeltaNet",
    "GatedDeltaNet",
    "MIXERS",
    "build_mixer",
    "mixer_options",
    "StateCache",
    "ShortConvolution",
    "RMSNorm",
    "GatedRMSNorm",
    "rotate",
    "DECAY_PARAMETERS",
    "decayed_parameters",
    "parameter_groups",
]
