"""Which mixer sits in which layer, and with which constructor arguments."""

import difflib
from typing import Any

from torch import nn

from gka import layers
from gka.errors import InputError
from gka.layers import MIXERS, mixer_options
from gka.models.fields import GKAFields
from gka.models.rope import rotary_frequencies

SOFTMAX_MIXERS = ("attention", "swa")
DELTA_MIXERS = ("deltanet", "gated_deltanet")
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
    if name in DELTA_MIXERS:
        # GKA's kernels have no delta rule: its own choice is an override
        values["backend"] = "torch" if config.backend in ("torch", "reference") else "auto"
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
