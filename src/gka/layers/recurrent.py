"""What the mixers with a state of constant size share: everything but the state's own mathematics.

hidden states -> projections -> short convolutions + SiLU -> unit queries and keys -> gates ->
the mixer's memory (`mix`) -> gated RMSNorm of each head -> output projection.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gka.layers import fused
from gka.layers.cache import OBSERVER, check_rows, open_cache, read_state, recurrent_layer
from gka.layers.convolution import ShortConvolution
from gka.layers.decay import DecayParameters
from gka.layers.expansion import HeadExpansion
from gka.layers.heads import check_head_dims, check_options, check_positive, value_dim
from gka.layers.mix_arguments import Gates, Run
from gka.layers.norms import GatedRMSNorm, RMSNorm, unit, working_dtype
from gka.layers.padding import Padding, check_inputs, check_width

MOST_DECAY = 1e30  # exp of minus that is 0, and its products with a gradient are finite
MOST_LOG_RATE = 60.0  # e^60 times a gradient is finite, and g = -1e-12 needs no subnormal softplus
DECODE_TOKENS = 16
"""Cached calls without gradient of up to this many tokens run token by token, longer ones by chunks."""


class RecurrentMixer(DecayParameters):
    """Base of the recurrent mixers; a subclass gives `mix`, and b_proj and alpha_proj if it has those gates.

    On an NVIDIA GPU convolutions, gates and output norm run as fused kernels; `why_plain` tells where not.

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
    ) -> tuple[Tensor, None, Any]:
        """Mix the tokens.

        Args:
            hidden_states: [B,T,hidden_size].
            attention_mask: [B,>=T], 1 for tokens and 0 for padding on either side; its last T columns
                are those of hidden_states. Padding has no influence, and its output is zero.
            past_key_values: a `transformers` cache or a `StateCache`: read, and updated in place.
            use_cache: start a `StateCache` if past_key_values is None. Where one is given, it is
                used and updated whatever this says.
            cu_seqlens: bounds [N+1] of sequences packed into B = 1; not with a mask or cache.
            position_ids: part of every mixer's call; a recurrence has its order and needs no positions.
                They separate nothing: sequences are told apart by cu_seqlens alone.
            cu_seqlens_cpu: a copy of cu_seqlens on the CPU; with it nothing waits for the device.

        Returns:
            Output [B,T,hidden_size], None (there are no attention weights), and the cache.

        Raises:
            ValueError: arguments that do not fit; the message names which.
        """
        attention_mask = check_inputs(hidden_states, attention_mask, cu_seqlens)
        check_width(hidden_states, self.hidden_size)
        cache = open_cache(past_key_values, use_cache, self.layer_idx, cu_seqlens)
        layer = recurrent_layer(cache, self.layer_idx)
        check_rows(cache, self.layer_idx, hidden_states.shape[0])
        padding = Padding.of(attention_mask, hidden_states.shape[1])
        x = hidden_states if padding is None else padding.align(hidden_states)

        inputs = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        fuse = self.why_plain(x.device, inputs[0].dtype) is None
        run = self._plan(layer, padding, (cu_seqlens, cu_seqlens_cpu), x.shape[1])
        if fuse and run.stepwise and fused.can_step(self, layer):
            projected = self._gate_projections(x)
            convolved, (beta, alpha, g) = fused.step(self, inputs, projected, layer, padding)
            q, k, v = self._split(convolved)
            gates = Gates(g, beta, alpha)
        else:
            q, k, v = self._heads(inputs, layer, padding, cu_seqlens, fuse)
            gates = self.gates(x, padding, fuse)
        observe = getattr(layer, OBSERVER, None)
        if observe is not None:
            observe(self, q, k, gates)
        o, states = self.mix(q, k, v, gates, run)
        for idx, state in enumerate(states):
            layer.update_recurrent_state(state.detach(), idx)

        output = self.o_proj(self._readout(o, x, fuse))
        return output if padding is None else padding.restore(output), None, cache

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, run: Run
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The memory itself.

        Args:
            q: unit queries [B,T,H,K]. k: unit keys [B,T,Hk,K], zero at padding. v: [B,T,Hv,V].
            gates: the decay, beta and alpha of every token.
            run: states and circumstances.

        Returns:
            o [B,T,H,V], and the final states if `run.keep`, else (); () too where it updated `run.states`
            in place.
        """
        raise NotImplementedError

    def why_plain(self, device: torch.device | str, dtype: torch.dtype) -> str | None:
        """Why convolutions, gates and output norm run as plain torch modules; None if fused kernels do.

        Args:
            device, dtype: of what the projections give (under torch.autocast: its dtype).

        Raises:
            RuntimeError: `backend` names kernels, which cannot run there; the message says why.
        """
        return fused.why_plain(self, device, dtype)

    def gates(self, x: Tensor, padding: Padding | None = None, fuse: bool = False) -> Gates:
        """The gates of hidden states [B,T,hidden_size]; `fuse`: by one kernel.

        beta = sigmoid(b_proj x) + beta_eps, alpha = sigmoid(alpha_proj x),
        g = -exp(A_log) softplus(a_proj x + dt_bias).
        """
        projected = self._gate_projections(x)
        if fuse:
            beta, alpha, g = fused.gates(self, projected, padding)
            return Gates(g, beta, alpha)
        dtype = working_dtype(x)
        wide = {name: y.to(dtype) for name, y in projected.items()}
        return Gates(
            g=self._log_decay(wide["a"], padding) if "a" in wide else None,
            beta=torch.sigmoid(wide["b"]) + self.beta_eps if "b" in wide else None,
            alpha=torch.sigmoid(wide["alpha"]) if "alpha" in wide else None,
        )

    def _gate_projections(self, x: Tensor) -> dict[str, Tensor]:
        """[B,T,H] of b_proj, alpha_proj and a_proj, of those that the mixer has."""
        named = ((name, getattr(self, f"{name}_proj", None)) for name in ("b", "alpha", "a"))
        return {name: projection(x) for name, projection in named if projection is not None}

    def _log_decay(self, a: Tensor, padding: Padding | None) -> Tensor:
        """[B,T,H], zero at padding. Rate and decay stay finite: inf times 0 would be NaN.

        What A_log has above MOST_LOG_RATE goes into the softplus, e^s softplus(x) = softplus(x + s) for
        x + s << 0. Where that does not hold both forms are a decay of 0.
        """
        A_log = self.A_log.to(a.dtype)
        rate = A_log.clamp_max(MOST_LOG_RATE).exp()
        shift = self.dt_bias.to(a.dtype) + F.relu(A_log - MOST_LOG_RATE)
        g = -(rate * F.softplus(a + shift)).clamp_max(MOST_DECAY)
        return g if padding is None else padding.clear(g)

    def _heads(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        layer: Any,
        padding: Padding | None,
        cu_seqlens: Tensor | None,
        fuse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve the projections (updating the layer's cache) and split into heads, unit for q and k."""
        if fuse:
            return self._split(fused.heads(self, inputs, layer, padding, cu_seqlens))
        convolved = (
            self._expand(name, self._convolve(name, y, layer, padding, cu_seqlens))
            for name, y in zip("qkv", inputs, strict=True)
        )
        q, k, v = self._split(tuple(convolved))
        q, k = unit(q), unit(k)
        return q, k if padding is None else padding.clear(k), v

    def _split(self, convolved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """[B,T,channels] of q, k and v into heads; queries as many as there are outputs."""
        dims = (self.head_dim, self.head_dim, self.head_v_dim)
        q, k, v = (y.unflatten(-1, (-1, dim)) for y, dim in zip(convolved, dims, strict=True))
        group = self.num_expanded_heads // self.num_heads
        return q if group == 1 else q.repeat_interleave(group, dim=2), k, v

    def _expand(self, name: str, y: Tensor) -> Tensor:
        """Keys or values of few heads to those of all, where a map for it has been learned."""
        expansion = getattr(self, f"{name}_expand", None)
        return y if expansion is None else expansion(y)

    def _convolve(
        self, name: str, y: Tensor, layer: Any, padding: Padding | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """One projection convolved, if it is, and the layer's cache updated."""
        convolution = getattr(self, f"{name}_conv1d", None)
        if convolution is None:
            return y
        idx = "qkv".index(name)
        state = None if layer is None else read_state(layer.conv_states, idx)
        out = convolution(y, state, cu_seqlens)
        if layer is not None:
            lengths = None if padding is None else padding.lengths
            layer.update_conv_state(convolution.next_state(y, state, lengths).detach(), idx)
        return out

    def _plan(
        self,
        layer: Any,
        padding: Padding | None,
        bounds: tuple[Tensor | None, Tensor | None],
        length: int,
    ) -> Run:
        cached = [] if layer is None else [
            read_state(layer.recurrent_states, i) for i in range(self.num_states)
        ]  # fmt: skip
        states = tuple(s for s in cached if s is not None)
        # the length last: where nothing is cached, no compiled graph depends on it
        few = layer is not None and not torch.is_grad_enabled() and length <= DECODE_TOKENS
        return Run(states, layer is not None, few, *bounds, padding)

    def _readout(self, o: Tensor, x: Tensor, fuse: bool) -> Tensor:
        """Norm of each head, gated by SiLU(g_proj x) if there is a gate: [B,T,H,V] -> [B,T,H*V]."""
        gate = self.g_proj(x) if self.use_gate else None
        if fuse:
            return fused.readout(self, o, gate).flatten(-2)
        if gate is None:
            return self.o_norm(o).flatten(-2)
        return self.o_norm(o, gate.unflatten(-1, (-1, self.head_v_dim))).flatten(-2)
