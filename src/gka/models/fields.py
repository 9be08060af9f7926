"""The fields of a model's configuration, and the mixer, rotary positions and experts that they describe."""

import difflib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gka import layers
from gka.errors import InputError
from gka.layers import MIXERS, mixer_options
from gka.layers.parts.sketch import check_sketch


@dataclass(kw_only=True)
class GKAFields:
    """The fields of `GKAConfig`.

    Attributes:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers. None: the length of `mixers`, else 24.
        intermediate_size: width of the SwiGLU MLP. None: 8/3 hidden_size, rounded up to a multiple of 32.
        mixer: mixer of every layer, a key of `gka.layers.MIXERS`.
        mixers: the mixer of each layer in turn, instead of `mixer`.
        attention_layers: layers (counted from 0) that use "attention" instead of `mixer`.
        head_dim: size of a head of the recurrent mixers. None: hidden_size / num_heads, rounded down. A
            stored configuration contains the value.
        num_heads, num_kv_heads, num_v_heads, expand_v: head counts of the recurrent mixers, and value size
            over head_dim, as in `gka.layers.GatedKalmaNet`. transformers' names num_attention_heads and
            num_key_value_heads are properties (see there for hybrids).
        num_k_heads, kv_rank, kv_mix, sketch_dim, sketch: for "gka" only, as in `GatedKalmaNet`.
        use_beta_gate, use_alpha_connection, use_v_conv, use_forgetting_gate, use_forgetting_gate_kk,
            gla_rescale, ridge_ratio, num_iter, use_gate, conv_size, backend, solver: as in `GatedKalmaNet`;
            the other recurrent mixers use those that they have. `backend` selects that of GKA's op. The delta
            rule's mixers then use "torch" for "torch" and "reference", else "auto"; `mixer_overrides` sets
            others.
        attention_num_heads, attention_num_kv_heads, attention_head_dim: sizes of the softmax mixers. None:
            those of the recurrent mixers (and with `attention_num_heads` alone, that many key-value heads).
        sliding_window: tokens that "swa" attends to, the current one included.
        rope_theta, qk_norm: rotary base, and query/key normalisation, of the softmax mixers.
        rope_options: scaling of their rotary positions: transformers' `rope_type` ("linear", "yarn" or
            "llama3") and its numbers. None: no scaling.
        attention_bias, attention_output_bias: biases of their maps to q, k, v, and of their output map.
        mixer_overrides: constructor options by mixer that differ from the fields above, such as
            `{"gated_deltanet": {"norm_eps": 1e-5}}`.
        moe: mixture-of-experts MLPs: `num_experts`, `num_experts_per_tok`, `moe_intermediate_size`,
            `norm_topk_prob`, and `layers`, those with experts. None: no experts.
        hidden_act: activation of the MLP's gate.
        norm_eps: epsilon of every RMSNorm.
        tie_word_embeddings: use one matrix for the embedding and the output.
        initializer_range: standard deviation of initial linear and embedding weights.
        use_cache: return a cache from forward passes in evaluation mode.
        pad_token_id, bos_token_id, eos_token_id: special tokens, for `generate`.
        max_position_embeddings: longest sequence that the model is meant for. Only transformers and trainers
            read it; no table has this length.
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
    sketch_dim: int | None = None
    sketch: str = "learned"
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


SOFTMAX_MIXERS = ("attention", "swa")
DELTA_MIXERS = ("deltanet", "gated_deltanet")
_NOT_OVERRIDDEN = ("hidden_size", "layer_idx", "inv_freq", "rope_scale")
# transformers' names of layer caches; every other mixer has a recurrent state.
_LAYER_TYPES = {"attention": "full_attention", "swa": "sliding_attention"}


def fewest_parameters(config: GKAFields) -> int:
    """Parameters of the embedding and the dense MLPs: a quickly computed lower bound of a model's."""
    layers, width = int(config.num_hidden_layers or 0), config.hidden_size
    dense = layers - len((config.moe or {}).get("layers", ()))
    return width * (config.vocab_size + 3 * dense * int(config.intermediate_size or 0))


def layer_types(pattern: list[str]) -> list[str]:
    """The layer types by which transformers' caches choose their layers."""
    return [_LAYER_TYPES.get(name, "linear_attention") for name in pattern]


def build_mixer(config: GKAFields, layer_idx: int) -> nn.Module:
    """The mixer of layer `layer_idx`, with the constructor arguments that `config` has for it."""
    name = config.pattern[layer_idx]
    values = mixer_values(config, name) | {"layer_idx": layer_idx}
    options = {key: values[key] for key in mixer_options(name) if key in values}
    return layers.build_mixer(name, **options)


def mixer_values(config: GKAFields, name: str) -> dict[str, Any]:
    """All configuration values for a mixer, under its constructor's argument names."""
    values = dict(vars(config))
    if name in DELTA_MIXERS:
        # GKA's kernels have no delta rule; other backends of it are set by an override.
        values["backend"] = "torch" if config.backend in ("torch", "reference") else "auto"
    if name in SOFTMAX_MIXERS:
        heads, kv_heads, head_dim = attention_heads(config)
        values |= {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        values["window_size"] = config.sliding_window
        if config.rope_options is not None:
            values["inv_freq"], values["rope_scale"] = rotary_frequencies(config, head_dim)
    return values | (config.mixer_overrides or {}).get(name, {})


def attention_heads(config: GKAFields) -> tuple[int, int, int]:
    """(heads, key-value heads, head size) of the softmax layers, with defaults.

    Without `attention_num_heads` they are those of the recurrent layers. With it, key-value heads default to
    the number of heads.
    """
    inherited = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    heads = config.attention_num_heads or config.num_heads
    kv_heads = inherited if config.attention_num_heads is None else heads
    head_dim = int(config.attention_head_dim or config.head_dim or 0)
    return heads, config.attention_num_kv_heads or kv_heads, head_dim


def check_parts(config: GKAFields) -> None:
    """Check the tables of a configuration: overrides, rotary positions and experts."""
    check_overrides(config)
    check_rope(config)
    check_experts(config)


def check_maps(config: GKAFields) -> None:
    """Raise `InputError` unless a sketch fits the heads of the GKA layers."""
    if "gka" in config.pattern:
        values = mixer_values(config, "gka")
        check_sketch(values["sketch_dim"], values["sketch"], values["head_dim"])


def check_pattern(config: GKAFields) -> None:
    """Raise `InputError` unless every layer's mixer is given exactly once, by a known name."""
    if config.mixers is not None and config.attention_layers is not None:
        raise InputError(
            "mixers and attention_layers both say where attention goes: give one of the two"
        )
    names = [config.mixer] if config.mixers is None else config.mixers
    for name in names:
        _check_name("mixer" if config.mixers is None else "mixers", name)
    if len(config.pattern) != config.num_hidden_layers:
        raise InputError(
            f"mixers names {len(config.pattern)} layers, but num_hidden_layers is "
            f"{config.num_hidden_layers}: give one mixer a layer, or leave num_hidden_layers out"
        )
    _check_attention_layers(config)


def check_overrides(config: GKAFields) -> None:
    """Raise `InputError` if `mixer_overrides` names a mixer or an option that does not exist."""
    for name, options in (config.mixer_overrides or {}).items():
        _check_name("mixer_overrides", name)
        known = [option for option in mixer_options(name) if option not in _NOT_OVERRIDDEN]
        if not isinstance(options, dict):
            raise InputError(
                f"mixer_overrides[{name!r}]: expected a table of options, got {options!r}"
            )
        for option in options:
            if option not in known:
                raise InputError(
                    f"mixer_overrides[{name!r}]: no option {option!r}; it has {', '.join(known)}"
                )


def _check_name(argument: str, name: object) -> None:
    if name in MIXERS:
        return
    close = difflib.get_close_matches(str(name), MIXERS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(f"{argument}: unknown mixer {name!r}{hint}; known: {', '.join(MIXERS)}")


def _check_attention_layers(config: GKAFields) -> None:
    chosen, layers = config.attention_layers or [], config.num_hidden_layers
    outside = [layer for layer in chosen if not 0 <= layer < (layers or 0)]
    if outside:
        raise InputError(
            f"attention_layers: {outside} lie outside the {layers} layers, counted 0..{(layers or 0) - 1}"
        )
    if len(set(chosen)) != len(chosen):
        raise InputError(f"attention_layers: {chosen} names a layer twice")


ROPE_TYPES = ("linear", "yarn", "llama3")
"""Supported scalings: those that do not depend on the current length, unlike `dynamic` and `longrope`."""


def rotary_frequencies(config: GKAFields, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Angles per position [head_dim / 2] and the factor of rotated vectors, from `config.rope_options`."""
    options = dict(config.rope_options or {})
    # The values are needed even if the model is constructed on the meta device.
    with torch.device("cpu"):
        return _frequencies(config, options, head_dim)


def _frequencies(
    config: GKAFields, options: dict[str, Any], head_dim: int
) -> tuple[tuple[float, ...], float]:
    carrier = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=options | {"rope_theta": config.rope_theta},
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[options["rope_type"]](carrier, "cpu")
    return tuple(inv_freq.tolist()), float(factor)


def check_rope(config: GKAFields) -> None:
    """Raise `InputError` if `rope_options` has no known scaling, or lacks its numbers."""
    if config.rope_options is None:
        return
    kind = config.rope_options.get("rope_type")
    if kind not in ROPE_TYPES:
        raise InputError(
            f"rope_options: rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}"
        )
    try:
        frequencies, factor = rotary_frequencies(config, 8)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"rope_options of type {kind!r}: {error}") from error
    if not all(map(math.isfinite, (*frequencies, factor))):
        raise InputError(f"rope_options of type {kind!r}: their numbers give no finite angles")


_FIELDS = {
    "num_experts": int,
    "num_experts_per_tok": int,
    "moe_intermediate_size": int,
    "norm_topk_prob": bool,
    "layers": list,
}


def has_experts(config: GKAFields, layer_idx: int) -> bool:
    """Whether the layer's MLP is a mixture of experts."""
    return config.moe is not None and layer_idx in config.moe["layers"]


def build_experts(config: GKAFields) -> nn.Module:
    """A router `gate` and `experts`, [B,T,hidden_size] -> [B,T,hidden_size]. Adds no balancing loss."""
    from transformers import Qwen3MoeConfig, conversion_mapping
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    values: dict[str, Any] = {k: v for k, v in (config.moe or {}).items() if k != "layers"}
    carrier = Qwen3MoeConfig(hidden_size=config.hidden_size, hidden_act=config.hidden_act, **values)
    block = Qwen3MoeSparseMoeBlock(carrier)
    for part in (block.gate, block.experts):
        part.starts_normal = True  # pyright: ignore[reportArgumentType]
    # Experts are stored singly and stacked in memory; transformers' loader converts them by model type.
    stacking: Any = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    conversion_mapping.register_checkpoint_conversion_mapping(
        config.model_type, stacking, overwrite=True
    )
    return block


def check_experts(config: GKAFields) -> None:
    """Raise `InputError` if `moe` lacks a field, has an unknown one, or a wrong value."""
    moe = config.moe
    if moe is None:
        return
    if set(moe) != set(_FIELDS):
        raise InputError(f"moe: expected {', '.join(_FIELDS)}; got {', '.join(map(str, moe))}")
    for name, kind in _FIELDS.items():
        value = moe[name]
        if type(value) is not kind or (kind is int and value < 1):
            expected = "a positive int" if kind is int else f"a {kind.__name__}"
            raise InputError(f"moe: {name} must be {expected}, got {value!r}")
    if moe["num_experts_per_tok"] > moe["num_experts"]:
        raise InputError(
            f"moe: num_experts_per_tok = {moe['num_experts_per_tok']} exceeds num_experts = "
            f"{moe['num_experts']}"
        )
    outside = [i for i in moe["layers"] if i not in range(config.num_hidden_layers or 0)]
    if outside:
        raise InputError(f"moe: layers {outside} lie outside the {config.num_hidden_layers} layers")
