"""Checks of a configuration's values; each error names the field and says what was expected."""

import math
from dataclasses import fields
from typing import Any, get_args

from transformers.activations import ACT2FN

from gka.errors import InputError
from gka.layers.parts.heads import check_head_dims, split_heads, value_dim
from gka.maths.solvers import SolverName
from gka.models.fields import (
    SOFTMAX_MIXERS,
    GKAFields,
    attention_heads,
    check_experts,
    check_overrides,
    check_rope,
    mixer_values,
)
from gka.ops.backends import known_backends
from gka.ops.checks import check_numbers

_AT_LEAST_ZERO = ("num_iter", "initializer_range")
# Far above every model there is: beyond these a file is damaged, or made to exhaust whoever opens it.
MOST_SOLVER_STEPS = 10_000
_MOST = {
    "num_hidden_layers": 10_000,
    "num_iter": MOST_SOLVER_STEPS,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 26,
    "expand_v": 1024.0,
    "ridge_ratio": 1e6,
    "norm_eps": 1.0,
    "initializer_range": 1e3,
    "sliding_window": 1 << 62,
    "max_position_embeddings": 1 << 62,
}
_MOST_INT, _MOST_FLOAT = 1 << 16, 1e30
_MOST_LISTED = _MOST["num_hidden_layers"]
_WITHOUT_RANGE = ("pad_token_id", "bos_token_id", "eos_token_id", "attention_layers")


def check_types(config: GKAFields) -> None:
    """Every field of this package has its declared type and, if a number, a sensible sign."""
    for field in fields(GKAFields):
        value, allowed = getattr(config, field.name), get_args(field.type) or (field.type,)
        if not any(_is(value, kind) for kind in allowed):
            expected = " or ".join("None" if k is type(None) else _name(k) for k in allowed)
            raise InputError(f"{field.name}: expected {expected}, got {value!r}")
        if field.name not in _WITHOUT_RANGE:
            check_range(field.name, value)
        if isinstance(value, list | tuple) and len(value) > _MOST_LISTED:
            raise InputError(
                f"{field.name}: expected at most {_MOST_LISTED} entries, got {len(value)}"
            )


def check_sizes(config: GKAFields) -> None:
    """Head counts divide, value heads have a whole size, and names that transformers resolves exist."""
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act: transformers has no activation called {config.hidden_act!r}")
    if config.backend not in known_backends():
        raise InputError(
            f"backend: expected one of {', '.join(known_backends())}, got {config.backend!r}"
        )
    if config.solver not in get_args(SolverName):
        raise InputError(
            f"solver: expected one of {', '.join(get_args(SolverName))}, got {config.solver!r}"
        )
    check_overrides(config)
    check_rope(config)
    check_experts(config)
    _check_tables(config)
    if any(name not in SOFTMAX_MIXERS for name in config.pattern):
        _check_recurrent(config)
    if any(name in SOFTMAX_MIXERS for name in config.pattern):
        _check_softmax(config)
    if "swa" in config.pattern and config.sliding_window < 2:
        raise InputError(f"sliding_window: expected 2 or more tokens, got {config.sliding_window}")


def fewest_parameters(config: GKAFields) -> int:
    """Numbers in the embedding and the dense MLPs: a model has more, but counting these takes no time."""
    layers, width = int(config.num_hidden_layers or 0), config.hidden_size
    dense = layers - len((config.moe or {}).get("layers", ()))
    return width * (config.vocab_size + 3 * dense * int(config.intermediate_size or 0))


def _check_tables(config: GKAFields) -> None:
    """The numbers in `mixer_overrides` and `moe` have the ranges of fields."""
    for mixer, options in (config.mixer_overrides or {}).items():
        for name, value in options.items():
            if name not in _WITHOUT_RANGE:
                check_range(name, value, f"mixer_overrides[{mixer!r}][{name!r}]")
    for name, value in (config.moe or {}).items():
        check_range(name, value, f"moe[{name!r}]")


def _check_recurrent(config: GKAFields) -> None:
    try:
        split_heads(config.num_heads, config.num_kv_heads, config.num_v_heads, config.num_k_heads)
        for name in sorted(set(config.pattern) - set(SOFTMAX_MIXERS)):
            values = mixer_values(config, name)
            check_head_dims(values["head_dim"], value_dim(values["head_dim"], values["expand_v"]))
        check_numbers(config.ridge_ratio, config.num_iter, chunk_size=1)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _check_softmax(config: GKAFields) -> None:
    heads, kv_heads, head_dim = attention_heads(config)
    if heads % kv_heads:
        raise InputError(
            f"attention_num_kv_heads: {kv_heads} does not divide the {heads} attention heads"
        )
    if head_dim % 2:
        raise InputError(f"attention_head_dim: rotary positions need an even size, got {head_dim}")


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


def check_range(name: str, value: Any, argument: str | None = None) -> None:
    """Raise `InputError`, about `argument`, if a number is out of the range of the field `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    argument = argument or name
    least = "0 or more" if name in _AT_LEAST_ZERO else "more than 0"
    fits = value >= 0 if name in _AT_LEAST_ZERO else value > 0
    if not (fits and (isinstance(value, int) or math.isfinite(value))):
        raise InputError(f"{argument}: expected {least}, got {value}")
    most = _MOST.get(name, _MOST_INT if isinstance(value, int) else _MOST_FLOAT)
    if value > most:
        raise InputError(f"{argument}: expected at most {most:g}, got {value:.6g}")
