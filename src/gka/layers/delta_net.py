"""DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464).

The state takes one gradient step per token on the error of recalling the token's value.
"""

from functools import partial

from torch import Tensor, nn

from gka.layers.parts.heads import split_heads
from gka.layers.parts.surround import Gates, MixCall
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.ops.delta_rule import (
    BACKENDS,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from gka.ops.external import check_name


class DeltaNet(RecurrentMixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = K^-1/2 S_t^T q_t, with
    beta = sigmoid(b_proj); convolutions, unit queries and keys and output as in `GatedKalmaNet`.

    Args:
        hidden_size: width of the hidden states.
        expand_v: value head dim over head_dim.
        head_dim: K, of queries and keys.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads. None: num_heads.
        use_gate: whether the output norm is gated.
        conv_size: inputs a short convolution sees.
        norm_eps: epsilon of the output norm.
        layer_idx: the layer's place in a cache.
        backend: runs whole sequences, as in `gka.ops.delta_rule.chunk_gated_delta_rule`. With "torch" the
            convolutions, gates and norms run in plain torch, too.

    Raises:
        ValueError: sizes that do not fit; the message names which.
    """

    decays = False

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        use_gate: bool = True,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        layer_idx: int | None = None,
        backend: str = "auto",
    ):
        super().__init__(
            hidden_size, **split_heads(num_heads, num_kv_heads), expand_v=expand_v,
            head_dim=head_dim, use_v_conv=True, use_forgetting_gate=self.decays,
            use_gate=use_gate, conv_size=conv_size, layer_idx=layer_idx, norm_eps=norm_eps,
        )  # fmt: skip
        check_name(backend, BACKENDS)
        self.backend = backend
        self.b_proj = nn.Linear(hidden_size, self.num_expanded_heads, bias=False)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, call: MixCall
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        op = fused_recurrent_gated_delta_rule
        if not call.stepwise:
            op = partial(chunk_gated_delta_rule, backend=self.backend, context=call.context)
        o, state = op(
            q, k, v, gates.g, gates.beta, initial_state=call.states[0] if call.states else None,
            output_final_state=call.keep, cu_seqlens=call.cu_seqlens,
            cu_seqlens_cpu=call.cu_seqlens_cpu,
        )  # fmt: skip
        return o, () if state is None else (state,)


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose state decays: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,
    with g_t as in `GatedKalmaNet`. Arguments as in `DeltaNet`."""

    decays = True
