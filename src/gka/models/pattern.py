"""What sits in which layer: the mixer with its constructor arguments, rotary wavelengths, experts."""

import difflib
import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gka import layers
from gka.errors import InputError
from gka.layers import MIXERS, mixer_options
from gka.models.fields import GKAFields

SOFTMAX_MIXERS = ("attention", "swa")
_NOT_OVERRIDDEN = ("hidden_size", "layer_idx", "inv_freq", "rope_scale")
# How transformers' caches call what a layer keeps; every other mixer keeps a recurrent state.
_LAYER_TYPES = {"attention": "full_attention", "swa": "sliding_attention"}


def layer_types(pattern: list[str]) -> list[str]:
    """The names transformers' native caches choose their layers by."""
    return [_LAYER_TYPES.get(name, "linear_attention") for name in pattern]


def build_mixer(config: GKAFields, layer_idx: int) -> nn.Module:
    """The mixer of layer `layer_idx`; it takes from `config` the arguments its constructor names."""
    name = config.pattern[layer_idx]
    values = mixer_values(config, name) | {"layer_idx": layer_idx}
    options = {key: values[key] for key in mixer_options(name) if key in values}
    return layers.build_mixer(name, **options)


def mixer_values(config: GKAFields, name: str) -> dict[str, Any]:
    """Every configuration value a mixer may ask for, under its constructor's name for it."""
    values = dict(vars(config))
    if name in SOFTMAX_MIXERS:
        heads, kv_heads, head_dim = attention_heads(config)
        values |= {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        values["window_size"] = config.sliding_window
        if config.rope_options is not None:
            values["inv_freq"], values["rope_scale"] = rotary_frequencies(config, head_dim)
    return values | (config.mixer_overrides or {}).get(name, {})


def attention_heads(config: GKAFields) -> tuple[int, int, int]:
    """(heads, key-value heads, head size) of the softmax layers, defaults filled in.

    Without `attention_num_heads` they are the recurrent layers' own; with it, key-value heads default to
    as many as the heads.
    """
    inherited = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    heads = config.attention_num_heads or config.num_heads
    kv_heads = inherited if config.attention_num_heads is None else heads
    head_dim = int(config.attention_head_dim or config.head_dim or 0)
    return heads, config.attention_num_kv_heads or kv_heads, head_dim


def check_pattern(config: GKAFields) -> None:
    """Raise `InputError` if the layers' mixers are not stated once, completely and by known names."""
    if config.mixers is not None and config.attention_layers is not None:
        raise InputError(
            "mixers and attention_layers both say where attention goes: give one of the two"
        )
    names = [config.mixer] if config.mixers is None else config.mixers
    for name in names:
        _check_name("mixer" if config.mixers is None else "mixers", name)
    if len(config.pattern) != config.num_hidden_layers:
        raise InputError(
            f"mixers names {len(config.pattern)} layers, but num_hidden_layers is "
            f"{config.num_hidden_layers}: give one mixer a layer, or leave num_hidden_layers out"
        )
    _check_attention_layers(config)


def check_overrides(config: GKAFields) -> None:
    """Raise `InputError` if `mixer_overrides` names a mixer or an option that does not exist."""
    for name, options in (config.mixer_overrides or {}).items():
        _check_name("mixer_overrides", name)
        known = [option for option in mixer_options(name) if option not in _NOT_OVERRIDDEN]
        if not isinstance(options, dict):
            raise InputError(
                f"mixer_overrides[{name!r}]: expected a table of options, got {options!r}"
            )
        for option in options:
            if option not in known:
                raise InputError(
                    f"mixer_overrides[{name!r}]: no option {option!r}; it has {', '.join(known)}"
                )


def _check_name(argument: str, name: object) -> None:
    if name in MIXERS:
        return
    close = difflib.get_close_matches(str(name), MIXERS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(f"{argument}: unknown mixer {name!r}{hint}; known: {', '.join(MIXERS)}")


def _check_attention_layers(config: GKAFields) -> None:
    chosen, layers = config.attention_layers or [], config.num_hidden_layers
    outside = [layer for layer in chosen if not 0 <= layer < (layers or 0)]
    if outside:
        raise InputError(
            f"attention_layers: {outside} lie outside the {layers} layers, counted 0..{(layers or 0) - 1}"
        )
    if len(set(chosen)) != len(chosen):
        raise InputError(f"attention_layers: {chosen} names a layer twice")


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


_FIELDS = {
    "num_experts": int,
    "num_experts_per_tok": int,
    "moe_intermediate_size": int,
    "norm_topk_prob": bool,
    "layers": list,
}


def has_experts(config: GKAFields, layer_idx: int) -> bool:
    """Whether the layer's MLP is a mixture of experts."""
    return config.moe is not None and layer_idx in config.moe["layers"]


def build_experts(config: GKAFields) -> nn.Module:
    """The block: a router `gate` and `experts`, [B,T,hidden_size] to the same. No balancing loss is added."""
    from transformers import Qwen3MoeConfig, conversion_mapping
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    values: dict[str, Any] = {k: v for k, v in (config.moe or {}).items() if k != "layers"}
    carrier = Qwen3MoeConfig(hidden_size=config.hidden_size, hidden_act=config.hidden_act, **values)
    block = Qwen3MoeSparseMoeBlock(carrier)
    for part in (block.gate, block.experts):
        part.starts_normal = True  # pyright: ignore[reportArgumentType]
    # on disk experts lie one by one, in memory stacked: transformers' loader knows how, by the model's type
    stacking: Any = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    conversion_mapping.register_checkpoint_conversion_mapping(
        config.model_type, stacking, overwrite=True
    )
    return block


def check_experts(config: GKAFields) -> None:
    """Raise `InputError` if `moe` lacks a field, has one too many, or a value that does not fit."""
    moe = config.moe
    if moe is None:
        return
    if set(moe) != set(_FIELDS):
        raise InputError(f"moe: expected {', '.join(_FIELDS)}; got {', '.join(map(str, moe))}")
    for name, kind in _FIELDS.items():
        value = moe[name]
        if type(value) is not kind or (kind is int and value < 1):
            expected = "a positive int" if kind is int else f"a {kind.__name__}"
            raise InputError(f"moe: {name} must be {expected}, got {value!r}")
    if moe["num_experts_per_tok"] > moe["num_experts"]:
        raise InputError(
            f"moe: num_experts_per_tok = {moe['num_experts_per_tok']} exceeds num_experts = "
            f"{moe['num_experts']}"
        )
    outside = [i for i in moe["layers"] if i not in range(config.num_hidden_layers or 0)]
    if outside:
        raise InputError(f"moe: layers {outside} lie outside the {config.num_hidden_layers} layers")
