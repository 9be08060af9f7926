"""What a configuration says of a model: its fields, and the pattern of mixers that follows from them."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True)
class GKAFields:
    """The fields of `GKAConfig`, without transformers.

    Attributes:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers. None: the length of `mixers`, else 24.
        intermediate_size: width of the SwiGLU MLP. None: 8/3 hidden_size, rounded up to a multiple of 32.
        mixer: mixer of every layer, a key of `gka.layers.MIXERS`.
        mixers: the mixer of each layer in turn, instead of `mixer`.
        attention_layers: layers (counted from 0) that use "attention" instead of `mixer`.
        head_dim: size of a head of the recurrent mixers. None: hidden_size / num_heads, rounded down, as in
            recipes. A stored configuration has it written and keeps it.
        num_heads, num_kv_heads, num_v_heads, expand_v: their head counts, and the size of values beside
            head_dim, as in `gka.layers.GatedKalmaNet`.
            Also known as num_attention_heads and num_key_value_heads (properties; see there for hybrids).
        num_k_heads, kv_rank, kv_mix: of "gka" alone, as in `GatedKalmaNet`.
        use_beta_gate, use_alpha_connection, use_v_conv, use_forgetting_gate, use_forgetting_gate_kk,
            gla_rescale, ridge_ratio, num_iter, use_gate, conv_size, backend, solver: as in `GatedKalmaNet`;
            the other recurrent mixers take those that they have.
        attention_num_heads, attention_num_kv_heads, attention_head_dim: of the softmax mixers. None: those
            of the recurrent mixers (and with `attention_num_heads` alone, that many key-value heads).
        sliding_window: tokens that "swa" attends to, the current one among them.
        rope_theta, qk_norm: rotary base, and query/key normalisation, of the softmax mixers.
        rope_options: scaling of their rotary positions: transformers' `rope_type` ("linear", "yarn" or
            "llama3") and its numbers. None: no scaling.
        attention_bias, attention_output_bias: biases of their maps to q, k, v, and of their output map.
        mixer_overrides: by mixer, constructor options that differ from the fields above, such as
            `{"gated_deltanet": {"norm_eps": 1e-5}}`.
        moe: mixture-of-experts MLPs (`gka.models.pattern`): `num_experts`, `num_experts_per_tok`,
            `moe_intermediate_size`, `norm_topk_prob`, and `layers`, those that have one. None: no experts.
        hidden_act: activation of the MLP's gate.
        norm_eps: epsilon of every RMSNorm.
        tie_word_embeddings: one matrix for the embedding and the output.
        initializer_range: standard deviation of the linear and embedding weights at the start.
        use_cache: return a cache from forward passes in evaluation mode.
        pad_token_id, bos_token_id, eos_token_id: special tokens, for `generate`.
        max_position_embeddings: longest sequence the model is meant for. No table has this length;
            transformers and trainers read it.
    """

    model_type: ClassVar[str] = "gka"

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int | None = None
    intermediate_size: int | None = None
    mixer: str = "gka"
    mixers: list[str] | None = None
    attention_layers: list[int] | None = None
    head_dim: int | None = None
    num_heads: int = 16
    num_kv_heads: int | None = None
    num_v_heads: int | None = None
    num_k_heads: int | None = None
    expand_v: float = 1.0
    kv_rank: int | None = None
    kv_mix: bool = False
    use_beta_gate: bool = True
    use_alpha_connection: bool = True
    use_v_conv: bool = True
    use_forgetting_gate: bool = True
    use_forgetting_gate_kk: bool = True
    gla_rescale: bool = True
    ridge_ratio: float = 0.02
    num_iter: int = 30
    use_gate: bool = True
    conv_size: int = 4
    backend: str = "auto"
    solver: str = "chebyshev"
    attention_num_heads: int | None = None
    attention_num_kv_heads: int | None = None
    attention_head_dim: int | None = None
    sliding_window: int = 2048
    rope_theta: float = 10000.0
    rope_options: dict | None = None
    qk_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    mixer_overrides: dict | None = None
    moe: dict | None = None
    hidden_act: str = "silu"
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    max_position_embeddings: int = 4096

    @property
    def pattern(self) -> list[str]:
        """The mixer of every layer: `mixers`, or `mixer` with "attention" at `attention_layers`."""
        if self.mixers is not None:
            return list(self.mixers)
        attention = set(self.attention_layers or ())
        layers = range(self.num_hidden_layers or 0)
        return ["attention" if layer in attention else self.mixer for layer in layers]
