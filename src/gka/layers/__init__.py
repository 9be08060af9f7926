"""Sequence mixers behind one interface, and the parts they are made of. Torch only.

Every mixer is called alike and returns (output, None, cache):
`mixer(hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens, position_ids)`.
"""

from gka.layers.attention import SlidingWindowAttention, SoftmaxAttention
from gka.layers.cache import StateCache
from gka.layers.convolution import ShortConvolution
from gka.layers.decay import DECAY_PARAMETERS, decayed_parameters, parameter_groups
from gka.layers.delta_net import DeltaNet, GatedDeltaNet
from gka.layers.gated_kalmanet import GatedKalmaNet
from gka.layers.linear_attention import GatedLinearAttention
from gka.layers.norms import GatedRMSNorm, RMSNorm
from gka.layers.registry import MIXERS, build_mixer, mixer_options
from gka.layers.rotary import rotate

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
