"""Gated linear attention with a scalar decay: Gated KalmaNet without its ridge."""

from torch import Tensor

from gka.layers.parts.heads import split_heads
from gka.layers.parts.surround import Gates, MixCall
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.ops import chunk_simple_gla
from gka.ops.backends import known_backends
from gka.ops.external import EXTERNAL, check_name


class GatedLinearAttention(RecurrentMixer):
    """U_t = exp(g_t) U_{t-1} + k_t v_t^T, o_t = K^-1/2 U_t^T q_t.

    Convolutions, unit queries and keys, decay and output are those of `GatedKalmaNet`: the two differ only in
    the solve and its gates.

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
        backend: of the op, as in `gka.ops.chunk_simple_gla`, and of the modules around it, as in
            `GatedKalmaNet`. A library ("fla") runs whole sequences; decoding and the modules around the op
            then use "auto".

    Raises:
        ValueError: sizes that do not fit; the message names which.
    """

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
            head_dim=head_dim, use_v_conv=True, use_forgetting_gate=True, use_gate=use_gate,
            conv_size=conv_size, layer_idx=layer_idx, norm_eps=norm_eps,
        )  # fmt: skip
        check_name(backend, known_backends())
        self.backend = backend

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, call: MixCall
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, state = chunk_simple_gla(
            q, k, v, gates.g, initial_state=call.states[0] if call.states else None,
            output_final_state=call.keep, cu_seqlens=call.cu_seqlens,
            backend="auto" if call.stepwise and self.backend in EXTERNAL else self.backend,
            chunk_size=q.shape[1] if call.stepwise else 64, cu_seqlens_cpu=call.cu_seqlens_cpu,
            context=call.context,
        )  # fmt: skip
        return o, () if state is None else (state,)
