"""Replace softmax attention layers of a model by recurrent ones that start from the attention's weights.

Both kinds of layer have maps to queries, keys and values and an output map, which are copied. Parts that
only the attention has (rotary positions, norms of queries and keys, biases) are dropped. Parts that only
the recurrent layer has start as follows:

    convolutions   identity: the current input's tap 1, the others 0 (their SiLU remains)
    beta           0.95 at every token ("gka"); always 0.5 where `b_proj` has no bias ("gated_deltanet")
    alpha          0.05: nearly gated linear attention, the solution mixed in by a twentieth
    decay          g = -0.001 at every token: half of the memory is left after 693 tokens
    output gate    g_proj = o_proj^T / 2 + v_proj / 2, value heads repeated for the heads that share them
    output norm    weights 1
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gka.errors import InputError
from gka.layers import DECAY_PARAMETERS, SoftmaxAttention, mixer_options
from gka.layers.parts.heads import split_heads
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models.causal_lm import GKAForCausalLM
from gka.models.configuration import GKAConfig
from gka.models.fields import SOFTMAX_MIXERS, attention_heads, build_mixer, mixer_values

REPLACEMENTS = ("gka", "gated_deltanet")
"""Mixers that can replace attention."""

# Determined by the attention whose weights are copied.
_SIZES = ("head_dim", "num_heads", "num_kv_heads", "num_v_heads", "num_k_heads", "expand_v")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Initial values of a new mixer's gates, the same at every token.

    Attributes:
        alpha: share of the solution, in (0, 1).
        beta: strength of writes, in (0, 1); a gate without a bias has 0.5.
        decay: -g > 0; the memory is halved in log(2) / decay tokens.

    Raises:
        InputError: a number is out of range.
    """

    alpha: float = 0.05
    beta: float = 0.95
    decay: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected between 0 and 1")
        if not 0 < self.decay < math.inf:
            raise InputError(f"decay is {self.decay}; expected above 0")


def replace_attention(
    model: GKAForCausalLM,
    layers: Sequence[int],
    mixer: str = "gka",
    options: Mapping[str, Any] | None = None,
    start: Start | None = None,
) -> dict[int, SoftmaxAttention]:
    """Replace the attention of `layers` by recurrent mixers that start from its weights.

    Changes the model and its configuration in place; the result can be saved and loaded.

    Args:
        model: any model with softmax layers ("attention" or "swa").
        layers: indices of the layers to replace, from 0.
        mixer: "gka" or "gated_deltanet".
        options: options of the new mixers, such as {"num_iter": 15}; head counts and sizes are the
            attention's.
        start: initial values of the gates. None: `Start()`, the values above.

    Returns:
        The removed attention modules by layer, with which the former model can still be computed.

    Raises:
        InputError: a layer is not a softmax layer of the model, the mixer or an option is unknown, or the
            model already has such recurrent layers with other options. The model is then unchanged.
    """
    check_replacement(model.config, layers, mixer, options or {})
    config = _replaced_config(model.config, layers, mixer, options or {})
    new = {layer: build_mixer(config, layer) for layer in layers}
    old: dict[int, SoftmaxAttention] = {}
    for layer, recurrent in new.items():
        block: Any = model.model.layers[layer]
        old[layer] = block.mixer
        block.mixer = _begun_from(block.mixer, recurrent, start or Start())
    model.config.__dict__.update(config.__dict__)
    model._is_stateful = True
    return old


def check_replacement(
    config: GKAConfig, layers: Sequence[int], mixer: str, options: Mapping[str, Any]
) -> None:
    """Raise `InputError` if `replace_attention` would."""
    if mixer not in REPLACEMENTS:
        raise InputError(f"mixer is {mixer!r}; expected {' or '.join(map(repr, REPLACEMENTS))}")
    pattern = config.pattern
    softmax = [i for i, name in enumerate(pattern) if name in SOFTMAX_MIXERS]
    if not softmax:
        raise InputError(
            f"the model has no attention layers to replace: its layers are {', '.join(sorted(set(pattern)))}"
        )
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"layers is {list(layers)}; expected one or more different layers")
    for layer in layers:
        if not 0 <= layer < len(pattern):
            raise InputError(
                f"layer {layer} lies outside the {len(pattern)} layers, counted from 0"
            )
        if layer not in softmax:
            raise InputError(
                f"layer {layer} is {pattern[layer]!r}, not attention; attention layers are "
                f"{', '.join(map(str, softmax))}"
            )
        if mixer_values(config, pattern[layer]).get("use_short_conv"):
            raise InputError(
                f"layer {layer} has short convolutions (use_short_conv), which a replacement does not keep"
            )
    known = [
        name for name in mixer_options(mixer) if name not in (*_SIZES, "hidden_size", "layer_idx")
    ]
    for name in options:
        if name not in known:
            reason = (
                "follows from the attention" if name in _SIZES else f"known: {', '.join(known)}"
            )
            raise InputError(f"{mixer!r} has no option {name!r} here ({reason})")


def _replaced_config(
    before: GKAConfig, layers: Sequence[int], mixer: str, options: Mapping[str, Any]
) -> GKAConfig:
    """The configuration of the hybrid, with explicit sizes of the remaining softmax layers.

    If the model already has recurrent layers, the sizes of the new ones are overrides for their mixer.
    """
    heads, kv_heads, head_dim = attention_heads(before)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    wanted = sizes | dict(options)
    if "expand_v" in mixer_options(mixer):
        wanted["expand_v"] = 1.0
    config = copy.deepcopy(before)
    recurrent = set(before.pattern) - set(SOFTMAX_MIXERS)
    pattern = list(before.pattern)
    for layer in layers:
        pattern[layer] = mixer
    changes: dict[str, Any] = {
        "mixers": pattern, "attention_layers": None, "mixer": mixer,
        "attention_num_heads": heads, "attention_num_kv_heads": kv_heads, "attention_head_dim": head_dim,
    }  # fmt: skip
    if recurrent:
        overrides = copy.deepcopy(before.mixer_overrides or {})
        overrides[mixer] = overrides.get(mixer, {}) | wanted
        changes["mixer_overrides"] = overrides
    else:
        changes |= {"num_v_heads": None, "num_k_heads": None} | wanted
    for name, value in changes.items():
        setattr(config, name, value)
    config.check()
    if mixer in recurrent:
        _check_same(before, config, mixer)
    return config


def _check_same(before: GKAConfig, after: GKAConfig, mixer: str) -> None:
    """Refuse options that differ from those of the mixer's existing layers: a mixer has one set per model."""
    was, will = _options(before, mixer), _options(after, mixer)
    for name, value in was.items():
        if value != will[name]:
            raise InputError(
                f"the model has {mixer!r} layers already, with {name} = {value!r}; new ones would "
                f"need {will[name]!r}, and all layers of one mixer are alike"
            )


def _options(config: GKAConfig, mixer: str) -> dict[str, Any]:
    """The constructor options of a mixer, with head counts."""
    values, known = mixer_values(config, mixer), mixer_options(mixer)
    found: dict[str, Any] = {
        name: values.get(name) for name in known if name not in ("hidden_size", "layer_idx")
    }
    counts: dict[str, Any] = {
        name: found.pop(name, None) for name in ("num_kv_heads", "num_v_heads", "num_k_heads")
    }
    return found | dict(split_heads(values["num_heads"], **counts))


@torch.no_grad()
def _begun_from(attention: SoftmaxAttention, mixer: nn.Module, start: Start) -> nn.Module:
    """The recurrent mixer with the attention's weights and initial gates, on its device, in its dtype."""
    assert isinstance(mixer, RecurrentMixer)
    like = attention.q_proj.weight
    for name in ("q", "k", "v", "o"):
        getattr(mixer, f"{name}_proj").weight.copy_(getattr(attention, f"{name}_proj").weight)
    for name in ("q", "k", "v"):
        convolution = getattr(mixer, f"{name}_conv1d", None)
        if convolution is not None:
            convolution.weight.zero_()[..., -1] = 1.0
    if mixer.use_gate:
        mixer.g_proj.weight.copy_(output_gate(attention))
    mixer.o_norm.weight.fill_(1.0)
    _neutral_gates(mixer, start)
    for name, parameter in mixer.named_parameters():
        dtype = torch.float32 if name in DECAY_PARAMETERS else like.dtype
        parameter.data = parameter.data.to(like.device, dtype)
    return mixer.train(attention.training)


def output_gate(attention: SoftmaxAttention) -> Tensor:
    """o_proj^T / 2 + v_proj / 2 [heads * head_dim, hidden_size], value heads repeated for their group."""
    group = attention.num_heads // attention.num_kv_heads
    values = attention.v_proj.weight.unflatten(0, (attention.num_kv_heads, attention.head_dim))
    repeated = values.repeat_interleave(group, dim=0).flatten(0, 1)
    return (attention.o_proj.weight.T + repeated) / 2


def _neutral_gates(mixer: RecurrentMixer, start: Start) -> None:
    """Set the gates to the same value at every token, by zero maps and biases."""
    for name, value in (("b_proj", start.beta), ("alpha_proj", start.alpha)):
        gate = getattr(mixer, name, None)
        if gate is not None:
            gate.weight.zero_()
            if gate.bias is not None:
                gate.bias.fill_(math.log(value / (1 - value)))
    if mixer.use_forgetting_gate:
        mixer.a_proj.weight.zero_()
        mixer.A_log.zero_()
        mixer.dt_bias.fill_(math.log(math.expm1(start.decay)))
