"""Checks of a configuration's values; each error names the field and says what was expected."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from gka.errors import InputError
from gka.layers.heads import check_head_dims, split_heads, value_dim
from gka.maths.chebyshev import Solver
from gka.models.experts import check_experts
from gka.models.pattern import SOFTMAX_MIXERS, attention_heads, check_overrides, mixer_values
from gka.models.rope import check_rope
from gka.ops.backends import known_backends
from gka.ops.checks import check_numbers

if TYPE_CHECKING:
    from gka.models.configuration import GKAConfig

_AT_LEAST_ZERO = ("num_iter", "initializer_range")
_WITHOUT_RANGE = ("pad_token_id", "bos_token_id", "eos_token_id", "attention_layers")


def check_types(config: GKAConfig) -> None:
    """Every field of this package has its declared type and, if a number, a sensible sign."""
    for field in _own_fields(config):
        value, allowed = getattr(config, field.name), get_args(field.type) or (field.type,)
        if not any(_is(value, kind) for kind in allowed):
            expected = " or ".join("None" if k is type(None) else _name(k) for k in allowed)
            raise InputError(f"{field.name}: expected {expected}, got {value!r}")
        if field.name not in _WITHOUT_RANGE:
            _check_sign(field.name, value)


def check_sizes(config: GKAConfig) -> None:
    """Head counts divide, value heads have a whole size, and names that transformers resolves exist."""
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act: transformers has no activation called {config.hidden_act!r}")
    if config.backend not in known_backends():
        raise InputError(
            f"backend: expected one of {', '.join(known_backends())}, got {config.backend!r}"
        )
    if config.solver not in get_args(Solver):
        raise InputError(
            f"solver: expected one of {', '.join(get_args(Solver))}, got {config.solver!r}"
        )
    check_overrides(config)
    check_rope(config)
    check_experts(config)
    if any(name not in SOFTMAX_MIXERS for name in config.pattern):
        _check_recurrent(config)
    if any(name in SOFTMAX_MIXERS for name in config.pattern):
        _check_softmax(config)
    if "swa" in config.pattern and config.sliding_window < 2:
        raise InputError(f"sliding_window: expected 2 or more tokens, got {config.sliding_window}")


def _check_recurrent(config: GKAConfig) -> None:
    try:
        split_heads(config.num_heads, config.num_kv_heads, config.num_v_heads, config.num_k_heads)
        for name in sorted(set(config.pattern) - set(SOFTMAX_MIXERS)):
            values = mixer_values(config, name)
            check_head_dims(values["head_dim"], value_dim(values["head_dim"], values["expand_v"]))
        check_numbers(config.ridge_ratio, config.num_iter, chunk_size=1)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _check_softmax(config: GKAConfig) -> None:
    heads, kv_heads, head_dim = attention_heads(config)
    if heads % kv_heads:
        raise InputError(
            f"attention_num_kv_heads: {kv_heads} does not divide the {heads} attention heads"
        )
    if head_dim % 2:
        raise InputError(f"attention_head_dim: rotary positions need an even size, got {head_dim}")


def _own_fields(config: GKAConfig) -> list[Any]:
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return [field for field in fields(config) if field.name not in inherited]


def _is(value: Any, kind: Any) -> bool:
    """Like isinstance, where a bool is no number, a whole number is a float, and list[...] is looked into."""
    inner = get_args(kind)
    if inner:
        return isinstance(value, list | tuple) and all(_is(item, inner[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _name(kind: Any) -> str:
    return f"a list of {get_args(kind)[0].__name__}" if get_args(kind) else kind.__name__


def _check_sign(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least = "0 or more" if name in _AT_LEAST_ZERO else "more than 0"
    fits = value >= 0 if name in _AT_LEAST_ZERO else value > 0
    if not (fits and math.isfinite(value)):
        raise InputError(f"{name}: expected {least}, got {value}")
