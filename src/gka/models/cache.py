"""The cache of a decoder with recurrent layers, for transformers' `generate`."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from gka.layers.parts.cache import OBSERVER


class GKACache(DynamicCache):
    """transformers' `DynamicCache` with its native layers, which also counts tokens by itself.

    A recurrent layer's state has a constant size and no length, so a `DynamicCache` without any attention
    layer cannot say how many tokens it has seen, and `generate` asks. This one is told by the model.

    Args:
        config: the model's configuration; its `layer_types` choose the layers.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self._tokens = 0
        self._attends = any(isinstance(layer, CacheLayerMixin) for layer in self.layers)
        self._recurs = any(isinstance(x, LinearAttentionCacheLayerMixin) for x in self.layers)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more; called by the model once a forward pass."""
        self._tokens += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far (by the first attention layer, if there is one)."""
        return super().get_seq_length(layer_idx) if self._attends else self._tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin):
                # transformers 5.16 and 5.17 only zero the keys, and go on counting them as tokens
                layer.keys = layer.values = None
                layer.is_initialized = False
        self._tokens = 0

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` needs; called by assisted generation.

        Raises:
            ValueError: a layer is recurrent.
        """
        self._check_rollback()
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens again, as many as `DynamicCache.crop` makes of `tokens_to_remove`.

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
        """Call `observers[i](mixer, q, k, gates)` in the `with` block whenever recurrent layer i reads into
        this cache, and no other: q [B,T,H,K], k [B,T,Hk,K] and `Gates` as its `mix` is given them.
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
        layer: Any
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    for index, state in states.items():
                        states[index] = None if state is None else state[indices.to(state.device)]
            else:
                layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, next to each other."""
        layer: Any
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    for index, state in states.items():
                        states[index] = (
                            None if state is None else state.repeat_interleave(repeats, 0)
                        )
            else:
                layer.batch_repeat_interleave(repeats)

    @property
    def is_linear(self) -> list[bool]:
        """By layer, whether `generate` must take it that nobody knows how many tokens were seen: never.

        Of a cache of recurrent layers alone transformers 5.24 thinks so, and would feed the tokens that
        the cache has seen a second time.
        """
        return [False] * len(self.layers)

    @property
    def is_compileable(self) -> bool:
        """False: `generate` compiles only caches of a size known beforehand."""
        return False
