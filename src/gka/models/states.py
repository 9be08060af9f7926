"""What a cache holds, as named tensors: to copy, store, move and combine it."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models.cache import GKACache
from gka.models.configuration import GKAConfig
from gka.models.pattern import attention_heads


def cache_tensors(cache: GKACache) -> dict[str, Tensor]:
    """The tensors of a cache, not copied, by name.

    `layers.I.recurrent.N` [B,H,K,...] and `layers.I.conv.N` [B,channels,width] of recurrent layers,
    `layers.I.keys` and `layers.I.values` [B,heads,T,head_dim] of attention layers (the window's last
    positions for a sliding one). Layers that have seen nothing are left out.
    """
    found: dict[str, Tensor | None] = {}
    layer: Any
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CacheLayerMixin):
            named = {"keys": layer.keys, "values": layer.values}
        else:
            named = {f"recurrent.{n}": x for n, x in layer.recurrent_states.items()}
            named |= {f"conv.{n}": x for n, x in layer.conv_states.items()}
        found |= {f"layers.{index}.{name}": x for name, x in named.items()}
    return {name: x for name, x in found.items() if x is not None}


def state_shapes(model: Any, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, named as by `cache_tensors`, after `tokens` >= 1 positions of `rows` rows.

    Args:
        model: a `GKAForCausalLM`.
        rows: B.
        tokens: positions read, padding included.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(model.model.layers):
        of = _recurrent_shapes if isinstance(layer.mixer, RecurrentMixer) else _attention_shapes
        shapes |= {f"layers.{index}.{n}": (rows, *x) for n, x in of(layer.mixer, tokens).items()}
    return shapes


def _recurrent_shapes(mixer: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    heads, k, v = mixer.num_expanded_heads, mixer.head_dim, mixer.head_v_dim
    states = [(heads, k, k), (heads, k, v)][-mixer.num_states :]
    shapes = {f"recurrent.{n}": shape for n, shape in enumerate(states)}
    modules = [getattr(mixer, f"{name}_conv1d", None) for name in "qkv"]
    return shapes | {
        f"conv.{n}": (x.channels, x.width) for n, x in enumerate(modules) if x is not None
    }


def _attention_shapes(mixer: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    kept = tokens if mixer.window_size is None else min(tokens, mixer.window_size - 1)
    return dict.fromkeys(("keys", "values"), (mixer.num_kv_heads, kept, mixer.head_dim))


def fill_cache(cache: GKACache, tensors: dict[str, Tensor], tokens: int) -> GKACache:
    """Put tensors, named as by `cache_tensors`, into a new cache; they are taken over, not copied.

    The cache updates recurrent states in place: pass clones of tensors that are to be kept.

    Args:
        cache: a `GKACache` that has seen nothing.
        tensors: all tensors of a cache of the same model.
        tokens: positions that these have seen.

    Returns:
        `cache`.

    Raises:
        ValueError: a layer has no tensors, or there are tensors of other layers.
    """
    left = dict(tensors)
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        own = {n.removeprefix(prefix): left.pop(n) for n in tensors if n.startswith(prefix)}
        attends = isinstance(layer, CacheLayerMixin)
        if tokens and not ({"keys", "values"} <= set(own) if attends else "recurrent.0" in own):
            kind = "keys and values" if attends else "recurrent states"
            raise ValueError(f"layer {index} of the model needs {kind}; given: {sorted(own)}")
        if own and attends:
            _fill_attention(layer, own, tokens)
        else:
            _fill_recurrent(layer, own)
    if left:
        raise ValueError(f"the model has no place for {', '.join(sorted(left)[:4])}")
    cache.advance(tokens)
    return cache


def with_prefix(config: GKAConfig, past: Any) -> Any:
    """A cache that holds keys and values for every layer, as peft's prefix tuning makes it, as a `GKACache`.

    The prefix enters the attention layers; recurrent layers have no place for keys and values and begin
    empty. Gradients reach the prefix. Any other cache, or None, is returned as it is.

    Raises:
        ValueError: the model has no attention layer, or the prefix was made for other heads.
    """
    if not isinstance(past, DynamicCache) or isinstance(past, GKACache):
        return past
    types, layers = config.layer_types, past.layers
    given = [isinstance(x, CacheLayerMixin) and x.get_seq_length() > 0 for x in layers]
    if len(layers) != len(types) or "linear_attention" not in types or not all(given):
        return past
    attending = [i for i, kind in enumerate(types) if kind != "linear_attention"]
    if not attending:
        raise ValueError(
            "past_key_values holds keys and values, as prefix tuning makes them, but this model has no "
            "attention layer that could read them; prompt tuning works with every model"
        )
    _, heads, dim = attention_heads(config)
    cache = GKACache(config)
    for index in attending:
        keys, values = layers[index].keys, layers[index].values  # pyright: ignore
        if (keys.shape[1], keys.shape[3]) != (heads, dim):  # pyright: ignore
            raise ValueError(
                f"past_key_values: the attention layers have {heads} key and value heads of size {dim}, the "
                f"prefix {keys.shape[1]} of {keys.shape[3]}; PrefixTuningConfig(num_attention_heads={heads}, "  # pyright: ignore
                f"token_dim={heads * dim}) makes one that fits"
            )
        _fill_attention(cache.layers[index], {"keys": keys, "values": values}, keys.shape[2])  # pyright: ignore
    cache.advance(past.get_seq_length())
    return cache


def _fill_attention(layer: Any, own: dict[str, Tensor], tokens: int) -> None:
    layer.update(own["keys"], own["values"])
    if hasattr(layer, "cumulative_length"):  # a sliding window counts what it has dropped
        layer.cumulative_length = tokens


def _fill_recurrent(layer: Any, own: dict[str, Tensor]) -> None:
    for name, state in own.items():
        kind, _, number = name.partition(".")
        index = int(number)
        if kind == "conv":
            layer.lazy_initialization(conv_states=state, state_idx=index)
            layer.conv_states[index] = state
            layer.has_previous_state[index] = True
        else:
            layer.lazy_initialization(recurrent_states=state, state_idx=index)
            layer.recurrent_states[index] = state
