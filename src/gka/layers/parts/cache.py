"""The cache of mixers between calls, in torch alone, and the access to any cache.

`transformers` caches and `StateCache` share one protocol. A `StateCache` holds values without autograd
history: no gradient flows from one call into earlier ones. States may be updated in place: copy them to
keep them.
"""

from typing import Any

import torch
from torch import Tensor

OBSERVER = "observer"
"""Attribute of a layer's cache, a function that a recurrent mixer calls with (mixer, q, k, gates) before its
memory. It belongs to one cache, so callers that share a model see only their own tokens."""


class LayerState:
    """One layer's share of a `StateCache`: a recurrent mixer's states, or an attention's keys and values.

    Attributes:
        conv_states: last inputs of the convolutions of q (0), k (1) and v (2), [B,channels,width].
        recurrent_states: the mixer's states, [B,H,K,...].
        keys, values: [B,heads,T,head_dim].
        length: tokens that keys and values have seen, dropped ones included.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.conv_states: dict[int, Tensor] = {}
        self.recurrent_states: dict[int, Tensor] = {}
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def update_conv_state(self, state: Tensor, state_idx: int = 0) -> Tensor:
        self.conv_states[state_idx] = kept(state, self.conv_states.get(state_idx))
        return state

    def update_recurrent_state(self, state: Tensor, state_idx: int = 0) -> Tensor:
        self.recurrent_states[state_idx] = kept(state, self.recurrent_states.get(state_idx))
        return state

    def update(
        self, keys: Tensor, values: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append; returns kept and new keys and values, and drops those that no later token can see."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
            self.length += keys.shape[-2] - self.keys.shape[-2]
        else:
            self.length = keys.shape[-2]
        first = 0 if window is None else max(keys.shape[-2] - window + 1, 0)
        self.keys, self.values = (own(x[..., first:, :].detach(), x) for x in (keys, values))
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for idx, state in states.items():
                states[idx] = state.index_select(0, beam_idx.to(state.device))
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))


class StateCache:
    """States of any pattern of mixers, for use without `transformers`; layers are added at first use.

    Example:
        >>> layer = GatedKalmaNet(hidden_size=64, head_dim=16, num_heads=4, layer_idx=0)
        >>> cache = StateCache()
        >>> prompt, _, _ = layer(x[:, :100], past_key_values=cache)
        >>> token, _, _ = layer(x[:, 100:101], past_key_values=cache)
    """

    def __init__(self):
        self.layers: list[LayerState] = []

    def layer(self, layer_idx: int) -> LayerState:
        """The layer's state, created at first use."""
        while len(self.layers) <= layer_idx:
            self.layers.append(LayerState())
        return self.layers[layer_idx]

    def update_conv_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Keep `state` [B,channels,width] as the layer's convolution state `state_idx`."""
        return self.layer(layer_idx).update_conv_state(state, state_idx)

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Keep `state` as the layer's recurrent state `state_idx`."""
        return self.layer(layer_idx).update_recurrent_state(state, state_idx)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B,heads,T,head_dim] and return what this call's tokens can see.

        With a `window`, keys that no later token can see are dropped.
        """
        return self.layer(layer_idx).update(keys, values, window)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens an attention layer has seen; 0 before its first call.

        Raises:
            ValueError: the layer is recurrent: its states have no length.
        """
        layer = self.layer(layer_idx)
        if layer.recurrent_states:
            raise ValueError(f"layer {layer_idx} is recurrent and does not count its tokens")
        return layer.length

    def reset(self) -> None:
        """Forget everything, in every layer."""
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was (beam search)."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)


def open_cache(
    past_key_values: Any, use_cache: bool, layer_idx: int | None, cu_seqlens: Tensor | None
) -> Any:
    """The cache of a call: the given one, a new `StateCache` if use_cache is set, or None.

    Raises:
        ValueError: packed sequences, or a mixer without layer_idx.
    """
    if past_key_values is None and not use_cache:
        return None
    if cu_seqlens is not None:
        raise ValueError(
            "packed sequences (cu_seqlens) cannot be cached: run them as a padded batch with "
            "attention_mask, or leave out past_key_values and use_cache"
        )
    if layer_idx is None:
        raise ValueError(
            "a cache needs to know the layer: construct the mixer with layer_idx=0, 1, ..."
        )
    return StateCache() if past_key_values is None else past_key_values


def recurrent_layer(cache: Any, layer_idx: int | None, num_states: int = 3) -> Any:
    """The layer cache of a recurrent mixer in either kind of cache; None without a cache.

    Raises:
        ValueError: the cache has no place for this layer's states.
    """
    if cache is None or layer_idx is None:
        return None
    if isinstance(cache, StateCache):
        return cache.layer(layer_idx)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if len(getattr(layer, "recurrent_states", ())) < num_states:
        raise ValueError(
            f"past_key_values has no linear-attention layer with {num_states} states at layer_idx = "
            f"{layer_idx} but {layer}: build it from the model's config, DynamicCache(config="
            "model.config), with 'linear_attention' in layer_types and number_of_conv_states = 3, "
            "or pass a gka.layers.StateCache()"
        )
    return layer


def convolving_layer(cache: Any, layer_idx: int | None) -> Any:
    """The layer cache of an attention with short convolutions; None without a cache.

    Raises:
        ValueError: the cache has no place for the convolutions' inputs.
    """
    if cache is None or layer_idx is None:
        return None
    if isinstance(cache, StateCache):
        return cache.layer(layer_idx)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    raise ValueError(
        f"past_key_values has {layer} at layer_idx = {layer_idx}, which has no place for short convolutions: "
        "give attention with use_short_conv a gka.layers.StateCache(), or no cache (use_cache=False)"
    )


def kept(state: Tensor, held: Tensor | None) -> Tensor:
    """The tensor that a cache holds after an update.

    It is `held`, overwritten if `state` fits, so that its address stays the same for a CUDA graph of a step.
    Inference-mode tensors cannot be written to outside that mode; tensors that autograd may keep are copied.
    """
    state = state.detach()
    fits = held is not None and (held.shape, held.dtype, held.device) == (
        state.shape, state.dtype, state.device
    )  # fmt: skip
    if held is not None and fits and _may_write(held):
        return held.copy_(state)
    return state.clone() if torch.is_grad_enabled() else state


def _may_write(held: Tensor) -> bool:
    if torch.compiler.is_compiling():  # Dynamo does not know inference mode
        return True
    return torch.is_inference_mode_enabled() or not held.is_inference()


def read_state(states: dict[int, Tensor | None], state_idx: int) -> Tensor | None:
    """A cached state; a copy where autograd may keep it, since caches are updated in place."""
    state = states.get(state_idx)
    return state.clone() if state is not None and torch.is_grad_enabled() else state


def cached_length(cache: Any, layer_idx: int | None) -> int:
    """Positions that an attention layer has seen, from either kind of cache; 0 without a cache.

    Raises:
        ValueError: the cache keeps no keys for this layer.
    """
    if cache is None or layer_idx is None:
        return 0
    if not isinstance(cache, StateCache) and layer_idx < len(cache.layers):
        layer = cache.layers[layer_idx]
        if not hasattr(layer, "keys"):
            raise ValueError(
                f"past_key_values has {layer} at layer_idx = {layer_idx}, which keeps no keys and "
                "values: build it from the model's config, DynamicCache(config=model.config), with "
                "'full_attention' or 'sliding_attention' for this layer in layer_types"
            )
    # a static cache counts in a tensor that its next update changes
    return int(cache.get_seq_length(layer_idx))


def append_keys(
    cache: Any, keys: Tensor, values: Tensor, layer_idx: int | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Append to an attention layer's cache of either kind; returns all visible keys and values.

    Without a cache these are k and v. `transformers` caches take their window from their config.
    """
    if cache is None or layer_idx is None:
        return keys, values
    if isinstance(cache, StateCache):
        return cache.update(keys, values, layer_idx, window)
    keys, values = cache.update(keys, values, layer_idx)
    layer = cache.layers[layer_idx]
    if window is not None and getattr(layer, "keys", None) is not None:
        layer.keys, layer.values = own(layer.keys, keys), own(layer.values, values)
    return keys, values


def own(part: Tensor, whole: Tensor) -> Tensor:
    """A copy of `part`, the last positions of `whole` [...,T,D]: a slice would keep all of `whole` alive.

    If `whole` has at most twice the positions, `part` itself: a window is not copied at each token.
    """
    large = torch.compiler.is_compiling() or whole.shape[-2] > 2 * part.shape[-2]
    return part.clone() if large and part.shape[-2] < whole.shape[-2] else part


def check_rows(cache: Any, layer_idx: int | None, batch: int) -> None:
    """Check that the call has as many rows as the layer's cache, unless that is empty.

    Raises:
        ValueError: the numbers differ.
    """
    if cache is None or layer_idx is None or layer_idx >= len(cache.layers):
        return
    layer = cache.layers[layer_idx]
    kept = [getattr(layer, "keys", None)]
    for states in ("conv_states", "recurrent_states"):
        kept.extend((getattr(layer, states, None) or {}).values())
    for held in kept:
        if held is not None and held.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {held.shape[0]} sequences, but hidden_states has a batch of {batch}: "
                "continue with as many rows in the cache's order (generate reorders, repeats and selects "
                "them itself), or start a new cache"
            )
