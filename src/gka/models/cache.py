"""The cache of a decoder with recurrent layers for transformers' `generate`, and its contents as tensors."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from gka.layers.parts.cache import OBSERVER
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models.configuration import GKAConfig
from gka.models.fields import attention_heads

CACHE_NAME = (
    "cache"
    if "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
    else "past_key_values"
)
"""The installed transformers' name of a cache in outputs and in `generate`: `past_key_values` until 5.23,
`cache` from 5.24 on. The models take a cache under either name."""


class GKACache(DynamicCache):
    """transformers' `DynamicCache` with its native layers, which also counts tokens.

    `generate` needs the number of tokens seen. The state of a recurrent layer has no length, so a
    `DynamicCache` without attention layers does not know it. Here the model counts them (`advance`).

    Args:
        config: the model's configuration; its `layer_types` choose the layers.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self._tokens = 0
        self._attends = any(isinstance(layer, CacheLayerMixin) for layer in self.layers)
        self._recurs = any(isinstance(x, LinearAttentionCacheLayerMixin) for x in self.layers)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more; the model calls this once per forward pass."""
        self._tokens += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far (by the first attention layer, if there is one)."""
        return super().get_seq_length(layer_idx) if self._attends else self._tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                # transformers 5.16 and 5.17 only zero the keys and still count them.
                layer.keys = layer.values = None
                layer.is_initialized = False
        self._tokens = 0

    def activate_past_recording(self) -> None:
        """Keep data for a later `crop`; called by assisted generation.

        Raises:
            ValueError: a layer is recurrent.
        """
        self._check_rollback()
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as `DynamicCache.crop`.

        Raises:
            ValueError: a layer is recurrent.
        """
        self._check_rollback()
        super().crop(tokens_to_remove)

    def _check_rollback(self) -> None:
        if self._recurs:
            raise ValueError(
                "recurrent states cannot be rolled back: tokens that are only tried must not enter them. "
                "Read from the states without committing and commit the accepted ones afterwards "
                "(gka.fused_recurrent_gka_ with commit=False, gka.advance_states_), or try on a copy "
                "(cache.clone(), gka.GenerationSession.fork()). Assisted generation would roll back: a "
                "model with recurrent layers can neither draft for another one nor be assisted; leave "
                "assistant_model out"
            )

    @contextmanager
    def observing(self, observers: dict[int, Callable[..., None]]) -> Iterator[None]:
        """Call `observers[i](mixer, q, k, gates)` in the `with` block when recurrent layer i uses this cache.

        The arguments are those of the mixer's `mix`: q [B,T,H,K], k [B,T,Hk,K] and `Gates`.
        """
        for index, observer in observers.items():
            setattr(self.layers[index], OBSERVER, observer)
        try:
            yield
        finally:
            for index in observers:
                delattr(self.layers[index], OBSERVER)

    def clone(self) -> "GKACache":
        """An independent copy."""
        return copy.deepcopy(self)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row indices[b] was; rows may be fewer, more or repeated."""
        self._change_rows("batch_select_indices", indices, lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies adjacent."""
        self._change_rows(
            "batch_repeat_interleave", repeats, lambda x: x.repeat_interleave(repeats, 0)
        )

    def _change_rows(self, method: str, given: Any, change: Callable[[Tensor], Tensor]) -> None:
        """Change rows: of attention layers by their own method, of recurrent states by `change`."""
        layer: Any
        for layer in self.layers:
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                getattr(layer, method)(given)
                continue
            for states in (layer.conv_states, layer.recurrent_states):
                for index, state in states.items():
                    states[index] = None if state is None else change(state)

    @property
    def is_linear(self) -> list[bool]:
        """By layer, whether the number of tokens seen is unknown to `generate`: always False.

        transformers 5.24 would assume True for a cache of recurrent layers alone, and feed the cached tokens
        a second time.
        """
        return [False] * len(self.layers)

    @property
    def is_compileable(self) -> bool:
        """False: `generate` compiles only caches of a fixed size."""
        return False


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache given under either name, or None.

    Raises:
        ValueError: it is given under both names.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "past_key_values and cache are two names of one argument: give one of the two"
        )
    return past_key_values if cache is None else cache


def cache_tensors(cache: GKACache) -> dict[str, Tensor]:
    """The tensors of a cache, not copied, by name.

    Recurrent layers have `layers.I.recurrent.N` [B,H,K,...] and `layers.I.conv.N` [B,channels,width],
    attention layers `layers.I.keys` and `layers.I.values` [B,heads,T,head_dim] (with a sliding window, the
    window's positions). Empty layers are left out.
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
    """The shapes of all tensors of `cache_tensors` after `tokens` >= 1 positions of `rows` rows.

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
    shapes = {f"recurrent.{n}": shape for n, shape in enumerate(mixer.state_shapes)}
    modules = [getattr(mixer, f"{name}_conv1d", None) for name in "qkv"]
    return shapes | {
        f"conv.{n}": (x.channels, x.width) for n, x in enumerate(modules) if x is not None
    }


def _attention_shapes(mixer: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    kept = tokens if mixer.window_size is None else min(tokens, mixer.window_size - 1)
    return dict.fromkeys(("keys", "values"), (mixer.num_kv_heads, kept, mixer.head_dim))


def fill_cache(cache: GKACache, tensors: dict[str, Tensor], tokens: int) -> GKACache:
    """Put tensors with the names of `cache_tensors` into a new cache, without a copy.

    The cache updates recurrent states in place: pass clones of tensors that must not change.

    Args:
        cache: an empty `GKACache`.
        tensors: all tensors of a cache of the same model.
        tokens: number of positions that they contain.

    Returns:
        `cache`.

    Raises:
        ValueError: tensors of a layer are missing, or there are tensors of other layers.
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
    """A `GKACache` of peft's prefix, which is a cache with keys and values for every layer.

    Attention layers get the prefix. Recurrent layers have no keys and values and start empty. Gradients reach
    the prefix. Any other cache, or None, is returned unchanged.

    Raises:
        ValueError: the model has no attention layer, or the prefix has other heads.
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
    if hasattr(layer, "cumulative_length"):  # a sliding window also counts dropped positions
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
