"""Causal softmax attention over the whole past or over a sliding window."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gka.layers.parts.cache import (
    append_keys,
    cached_length,
    check_rows,
    convolving_layer,
    open_cache,
)
from gka.layers.parts.heads import check_options, check_positive, rotary_dim, split_heads
from gka.layers.parts.masks import (
    Padding,
    check_inputs,
    check_mask_length,
    check_width,
    own_mask,
    positions_of,
    visible,
)
from gka.layers.parts.modules import RMSNorm, ShortConvolution, rotate
from gka.layers.parts.split_attention import attend_over_ranks
from gka.layers.parts.surround import PLAIN, QKV, MixCall
from gka.ops.checks import check_bounds
from gka.ops.context import SequenceContext


class SoftmaxAttention(nn.Module):
    """Causal softmax attention: rotary positions, grouped heads, RMSNorm of queries and keys.

    Args:
        hidden_size: width of the hidden states.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads. None: num_heads.
        head_dim: of every head, even. None: hidden_size / num_heads.
        qk_norm: whether queries and keys are normalised, before their rotation.
        rope_theta: base of the rotary wavelengths.
        norm_eps: epsilon of these norms.
        layer_idx: the layer's place in a cache.
        attention_bias: whether the maps to queries, keys and values have biases.
        attention_output_bias: whether the output map has one.
        inv_freq: rotary angles per position, head_dim / 2 of them, instead of those of rope_theta.
        rope_scale: factor of rotated queries and keys.
        use_short_conv: whether queries, keys and values go through short convolutions + SiLU first, as in the
            recurrent mixers. A cache must then keep the convolutions' inputs, too: a `StateCache` does.
        conv_size: inputs such a convolution sees.

    Raises:
        ValueError: sizes that do not fit; the message names which.
    """

    q_conv1d: ShortConvolution  # these three with use_short_conv
    k_conv1d: ShortConvolution
    v_conv1d: ShortConvolution

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = True,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        layer_idx: int | None = None,
        *,
        attention_bias: bool = False,
        attention_output_bias: bool = False,
        inv_freq: Sequence[float] | None = None,
        rope_scale: float = 1.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
    ):
        super().__init__()
        heads = split_heads(num_heads, num_kv_heads)
        check_options(norm_eps, layer_idx, qk_norm=qk_norm, use_short_conv=use_short_conv)
        check_positive(conv_size=conv_size)
        if not 0 < rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above 0 and finite, got {rope_theta}")
        self.num_heads, self.num_kv_heads = num_heads, heads["num_k_heads"]
        self.head_dim = rotary_dim(hidden_size, num_heads, head_dim)
        self.hidden_size = hidden_size
        self.rope_theta, self.rope_scale = rope_theta, rope_scale
        self._inv_freq = _frequencies(inv_freq, self.head_dim)
        self.layer_idx = layer_idx
        self.window_size: int | None = None
        kv_width = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=attention_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=attention_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=attention_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=attention_output_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.use_short_conv = use_short_conv
        if use_short_conv:
            for name in "qkv":
                width = getattr(self, f"{name}_proj").out_features
                setattr(self, f"{name}_conv1d", ShortConvolution(width, conv_size))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        context: SequenceContext | None = None,
    ) -> tuple[Tensor, None, Any]:
        """Attend.

        Padding and packing build a mask of [T, keys] entries; without them there is none.

        Args:
            hidden_states: [B,T,hidden_size].
            attention_mask: [B, past + T], 1 for tokens and 0 for padding on either side. Padding has
                no influence, and its output is zero.
            past_key_values: a `transformers` cache or a `StateCache`: read, and updated in place.
            use_cache: start a `StateCache` if past_key_values is None. A given cache is always used and
                updated.
            cu_seqlens: bounds [N+1] of sequences packed into B = 1; not with a mask or cache.
            position_ids: [B,T] or [1,T]. None: counted over the tokens of attention_mask, within the
                sequences of cu_seqlens, or from the cache's length. They only rotate: sequences are
                separated by cu_seqlens alone.
            cu_seqlens_cpu: part of every mixer's call; unused, as the mask is built on the device.
            context: a `gka.parallel.ContextParallel`: the tokens are this rank's part of rows that are split
                over ranks, all of which make the call. It holds mask and bounds; not with a cache.
                position_ids are of these tokens. None: counted in the whole rows.

        Returns:
            Output [B,T,hidden_size], None (attention weights are not formed), and the cache.

        Raises:
            ValueError: arguments that do not fit; the message names which.
        """
        if context is not None:
            given = attention_mask, cu_seqlens, past_key_values, use_cache
            attention_mask = own_mask(context, hidden_states, *given)
            position_ids = context.positions if position_ids is None else position_ids
        attention_mask = check_inputs(hidden_states, attention_mask, cu_seqlens)
        check_width(hidden_states, self.hidden_size)
        # reading them on a GPU would wait for the device
        read = cu_seqlens is not None and cu_seqlens.device.type == "cpu"
        if cu_seqlens is not None and read and not torch.compiler.is_compiling():
            check_bounds(cu_seqlens, hidden_states.shape[1])
        cache = open_cache(past_key_values, use_cache, self.layer_idx, cu_seqlens)
        check_rows(cache, self.layer_idx, hidden_states.shape[0])
        past = cached_length(cache, self.layer_idx)
        x, length = hidden_states, hidden_states.shape[1]
        check_mask_length(attention_mask, past, length)
        if position_ids is None:
            position_ids = positions_of(length, past, attention_mask, cu_seqlens, x.device)
        elif position_ids.dim() != 2 or position_ids.shape[1] != length:
            raise ValueError(
                f"position_ids must be [batch, {length}], got shape {tuple(position_ids.shape)}"
            )
        padding = None if attention_mask is None else ~attention_mask[:, -length:, None].bool()
        x = x if padding is None else x.masked_fill(padding, 0)

        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            layer = convolving_layer(cache, self.layer_idx)
            projected = self._convolve(projected, layer, attention_mask, cu_seqlens, context)
        q, k, v = self._heads(projected, position_ids)
        if context is not None:
            o = attend_over_ranks(q, k, v, context, self.window_size)
        else:
            k, v = append_keys(cache, k, v, self.layer_idx, self.window_size)
            o = self._attend(q, k, v, past, attention_mask, cu_seqlens)
        output = self.o_proj(o.transpose(1, 2).flatten(-2))
        return output if padding is None else output.masked_fill(padding, 0), None, cache

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, past: int, attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention of queries [B,H,T,D] after `past` positions."""
        length = q.shape[-2]
        mask = visible(
            past, length, k.shape[-2], attention_mask=attention_mask, cu_seqlens=cu_seqlens,
            window=self.window_size, device=q.device,
        )  # fmt: skip
        # Without a past, one token is a causal call, too: no compiled graph depends on the length. With a
        # past, one token sees all keys.
        causal = mask is None and bool(past == 0 or length > 1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )  # fmt: skip

    def _convolve(
        self, projected: QKV, layer: Any, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
        context: SequenceContext | None,
    ) -> QKV:  # fmt: skip
        """Short convolutions + SiLU of q, k and v [B,T,channels]; updates the layer's cache."""
        padding = Padding.of(attention_mask, projected[0].shape[1])
        call = MixCall(layer, (), False, cu_seqlens, None, padding, context)
        if padding is None:
            return PLAIN.convolve(self, projected, call)
        q, k, v = (padding.align(y) for y in projected)
        q, k, v = PLAIN.convolve(self, (q, k, v), call)
        return padding.restore(q), padding.restore(k), padding.restore(v)

    def _heads(self, projected: QKV, position_ids: Tensor) -> QKV:
        """q [B,H,T,D], k and v [B,Hk,T,D], normalised and rotated."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        q, k = (
            self.turn(norm(y), position_ids, self.rope_scale)
            for norm, y in ((self.q_norm, q), (self.k_norm, k))
        )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def turn(self, x: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
        """x [B,T,H,D] rotated by positions [B,T] (or, if already rotated, further by them), times scale."""
        if self._inv_freq is not None and self._inv_freq.device != x.device:
            self._inv_freq = self._inv_freq.to(x.device)
        return rotate(x, positions, self.rope_theta, self._inv_freq, scale)


def _frequencies(inv_freq: Sequence[float] | None, head_dim: int) -> Tensor | None:
    """inv_freq as a plain tensor: no buffer, so no cast rounds it and it has values on a meta device."""
    if inv_freq is None:
        return None
    if len(inv_freq) != head_dim // 2:
        raise ValueError(
            f"inv_freq must have head_dim / 2 = {head_dim // 2} numbers, got {len(inv_freq)}"
        )
    return torch.tensor(inv_freq, dtype=torch.float32, device="cpu")


class SlidingWindowAttention(SoftmaxAttention):
    """`SoftmaxAttention` in which each token sees the last `window_size` positions, its own included.

    The window counts array positions, padding included, and a cache keeps only these positions. For
    decoding pad on the left, so that tokens stay adjacent.

    Args:
        window_size: positions seen, at least 1.
        hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, rope_theta, norm_eps, layer_idx,
            attention_bias, attention_output_bias, inv_freq, rope_scale, use_short_conv, conv_size: as in
            `SoftmaxAttention`.

    Raises:
        ValueError: sizes that do not fit; the message names which.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = True,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        layer_idx: int | None = None,
        window_size: int = 2048,
        *,
        attention_bias: bool = False,
        attention_output_bias: bool = False,
        inv_freq: Sequence[float] | None = None,
        rope_scale: float = 1.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
    ):
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, rope_theta, norm_eps, layer_idx,
            attention_bias=attention_bias, attention_output_bias=attention_output_bias,
            inv_freq=inv_freq, rope_scale=rope_scale, use_short_conv=use_short_conv,
            conv_size=conv_size,
        )  # fmt: skip
        check_positive(window_size=window_size)
        self.window_size = window_size
