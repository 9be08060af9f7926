"""The base of mixers with a state of constant size: everything but the state's own mathematics.

hidden states -> projections -> short convolutions + SiLU -> unit queries and keys -> gates ->
the mixer's memory (`mix`) -> gated RMSNorm of each head -> output projection.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gka.layers.parts import surround
from gka.layers.parts.cache import OBSERVER, check_rows, open_cache, read_state, recurrent_layer
from gka.layers.parts.heads import (
    HeadExpansion,
    check_head_dims,
    check_options,
    check_positive,
    value_dim,
)
from gka.layers.parts.masks import Padding, check_inputs, check_width, own_mask
from gka.layers.parts.modules import DecayParameters, GatedRMSNorm, RMSNorm, ShortConvolution
from gka.layers.parts.surround import Gates, MixCall, Surround
from gka.ops.context import SequenceContext

DECODE_TOKENS = 16
"""Cached calls without gradient of up to this many tokens run token by token, longer ones chunk by chunk."""


class RecurrentMixer(DecayParameters):
    """Base of the recurrent mixers; a subclass adds `mix`, and b_proj and alpha_proj if it has those gates.

    On an NVIDIA GPU convolutions, gates and output norm run as fused kernels; `why_unfused` says when not.

    Args:
        hidden_size: width of the hidden states.
        expand_v: value head dim over head_dim.
        head_dim: K, of queries and keys, at most 256, as is V.
        num_heads: query heads.
        num_k_heads, num_v_heads: key and value heads.
        use_v_conv: whether values are convolved.
        use_forgetting_gate: whether there is a decay.
        use_gate: whether the output norm is gated.
        conv_size: inputs a short convolution sees.
        layer_idx: the layer's place in a cache.
        norm_eps: epsilon of the output norm.
    """

    num_states = 1
    beta_eps = 0.0  # added to sigmoid(b_proj)
    backend = "auto"  # "torch" and "reference" run every module by itself

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    a_proj: nn.Linear  # with a decay
    A_log: nn.Parameter  # with a decay
    dt_bias: nn.Parameter  # with a decay
    b_proj: nn.Linear  # with beta
    alpha_proj: nn.Linear  # with alpha
    g_proj: nn.Linear  # with an output gate
    q_conv1d: ShortConvolution
    k_conv1d: ShortConvolution
    v_conv1d: ShortConvolution  # with use_v_conv
    k_expand: HeadExpansion  # with a learned expansion
    v_expand: HeadExpansion

    def __init__(
        self,
        hidden_size: int,
        *,
        expand_v: float,
        head_dim: int,
        num_heads: int,
        num_k_heads: int,
        num_v_heads: int,
        use_v_conv: bool,
        use_forgetting_gate: bool,
        use_gate: bool,
        conv_size: int,
        layer_idx: int | None,
        norm_eps: float,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "head_dim": head_dim, "conv_size": conv_size}
        check_positive(**sizes, num_heads=num_heads)
        check_options(
            norm_eps, layer_idx, use_v_conv=use_v_conv, use_forgetting_gate=use_forgetting_gate,
            use_gate=use_gate,
        )  # fmt: skip
        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.head_v_dim = value_dim(head_dim, expand_v)
        check_head_dims(head_dim, self.head_v_dim)
        self.num_heads = num_heads
        self.num_k_heads = num_k_heads
        self.num_v_heads = num_v_heads
        self.num_expanded_heads = max(num_heads, num_k_heads, num_v_heads)
        self.use_gate = use_gate
        self.layer_idx = layer_idx
        channels = {
            "q": num_heads * head_dim,
            "k": num_k_heads * head_dim,
            "v": num_v_heads * self.head_v_dim,
        }
        for name, width in channels.items():
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
            if name != "v" or use_v_conv:
                setattr(self, f"{name}_conv1d", ShortConvolution(width, conv_size))
        self._add_decay(use_forgetting_gate)
        self._add_output(use_gate, norm_eps)

    def _add_decay(self, use_forgetting_gate: bool) -> None:
        self.use_forgetting_gate = use_forgetting_gate
        if not use_forgetting_gate:
            return
        heads = self.num_expanded_heads
        self.a_proj = nn.Linear(self.hidden_size, heads, bias=False)
        self._add_decay_parameters(heads)
        self.reset_parameters()

    def _add_expansions(self, rank: int, learned_mix: bool) -> None:
        """Expand key and value heads by learned maps (`HeadExpansion`) instead of sharing them."""
        for name, heads, dim in (
            ("k", self.num_k_heads, self.head_dim),
            ("v", self.num_v_heads, self.head_v_dim),
        ):
            expansion = HeadExpansion(heads, self.num_expanded_heads, dim, rank, learned_mix)
            setattr(self, f"{name}_expand", expansion)

    def _add_output(self, use_gate: bool, norm_eps: float) -> None:
        width = self.num_expanded_heads * self.head_v_dim
        if use_gate:
            self.g_proj = nn.Linear(self.hidden_size, width, bias=False)
        norm = GatedRMSNorm if use_gate else RMSNorm
        self.o_norm = norm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(width, self.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A_log = log U(0,16) and dt_bias, whose softplus is log-uniform in [1e-3, 0.1].

        Only the parameters that the mixer holds itself, not those of its submodules.
        """
        if not self.use_forgetting_gate:
            return
        # a draw of exactly 0 would make A_log infinite
        self.A_log.uniform_(0, 16).clamp_(min=1e-6).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        dt = dt.clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

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
        """Mix the tokens.

        Args:
            hidden_states: [B,T,hidden_size].
            attention_mask: [B,>=T], 1 for tokens and 0 for padding on either side; its last T columns
                are those of hidden_states. Padding has no influence, and its output is zero.
            past_key_values: a `transformers` cache or a `StateCache`: read, and updated in place.
            use_cache: start a `StateCache` if past_key_values is None. A given cache is always used and
                updated.
            cu_seqlens: bounds [N+1] of sequences packed into B = 1; not with a mask or cache.
            position_ids: part of every mixer's call; unused, as a recurrence needs no positions.
                Sequences are separated by cu_seqlens alone.
            cu_seqlens_cpu: a copy of cu_seqlens on the CPU; with it nothing waits for the device.
            context: a `gka.parallel.ContextParallel`: the tokens are this rank's part of rows that are split
                over ranks, all of which make the call. It holds mask and bounds; not with a cache.

        Returns:
            Output [B,T,hidden_size], None (there are no attention weights), and the cache.

        Raises:
            ValueError: arguments that do not fit; the message names which.
        """
        if context is not None:
            given = attention_mask, cu_seqlens, past_key_values, use_cache
            attention_mask = own_mask(context, hidden_states, *given)
        attention_mask = check_inputs(hidden_states, attention_mask, cu_seqlens)
        check_width(hidden_states, self.hidden_size)
        cache = open_cache(past_key_values, use_cache, self.layer_idx, cu_seqlens)
        layer = recurrent_layer(cache, self.layer_idx)
        check_rows(cache, self.layer_idx, hidden_states.shape[0])
        padding = Padding.of(attention_mask, hidden_states.shape[1])
        x = hidden_states if padding is None else padding.align(hidden_states)

        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        around = self._surround(x.device, projected[0].dtype)
        call = self._call(layer, padding, (cu_seqlens, cu_seqlens_cpu), context, x.shape[1])
        (q, k, v), gates = around.enter(self, projected, x, call)
        observe = getattr(layer, OBSERVER, None)
        if observe is not None:
            observe(self, q, k, gates)
        o, states = self.mix(q, k, v, gates, call)
        for idx, state in enumerate(states):
            layer.update_recurrent_state(state.detach(), idx)

        gate = self.g_proj(x) if self.use_gate else None
        output = self.o_proj(around.leave(self, o, gate))
        return output if padding is None else padding.restore(output), None, cache

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, call: MixCall
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The memory itself.

        Args:
            q: unit queries [B,T,H,K]. k: unit keys [B,T,Hk,K], zero at padding. v: [B,T,Hv,V].
            gates: the decay, beta and alpha of every token.
            call: past states and options of the call.

        Returns:
            o [B,T,H,V], and the final states; () if `call.keep` is false or `call.states` were updated in
            place.
        """
        raise NotImplementedError

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the memory's states of one sequence, in the order of the cache."""
        return [(self.num_expanded_heads, self.head_dim, self.head_v_dim)]

    def why_unfused(self, device: torch.device | str, dtype: torch.dtype) -> str | None:
        """Why convolutions, gates and output norm run as plain torch modules; None if fused kernels do.

        Args:
            device, dtype: of the projections' outputs (under torch.autocast: its dtype).

        Raises:
            RuntimeError: `backend` names kernels that cannot run there; the message says why.
        """
        return surround.why_unfused(self, device, dtype)

    def gates(self, x: Tensor) -> Gates:
        """The gates of hidden states [B,T,hidden_size], by plain torch."""
        return surround.PLAIN.gates(self, x)

    def _surround(self, device: torch.device, dtype: torch.dtype) -> Surround:
        return surround.PLAIN if self.why_unfused(device, dtype) else surround.FUSED

    def _call(
        self,
        layer: Any,
        padding: Padding | None,
        bounds: tuple[Tensor | None, Tensor | None],
        context: SequenceContext | None,
        length: int,
    ) -> MixCall:
        cached = [] if layer is None else [
            read_state(layer.recurrent_states, i) for i in range(self.num_states)
        ]  # fmt: skip
        states = tuple(s for s in cached if s is not None)
        # the length last: without a cache, no compiled graph depends on it
        few = layer is not None and not torch.is_grad_enabled() and length <= DECODE_TOKENS
        return MixCall(layer, states, few, *bounds, padding, context)
