"""transformers' own decoders, softmax attention in every layer: Qwen2, Qwen3, Qwen3-MoE, Llama, Mistral."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING

from gka.checkpoints.format import Format
from gka.errors import InputError
from gka.models.configuration import GKAConfig
from gka.models.fields import attention_heads

# Our field: theirs.
SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "max_position_embeddings": "max_position_embeddings",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_SLIDING = {"full_attention": "attention", "sliding_attention": "swa"}


@dataclass(frozen=True)
class Family:
    """The attention of one model type of transformers.

    Attributes:
        qk_norm: whether queries and keys are normalised.
        qkv_bias, output_bias: whether the maps have biases; None: the configuration's `attention_bias`.
        windowed: whether layers may have a sliding window.
    """

    qk_norm: bool = False
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    windowed: bool = True


FAMILIES = {
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "qwen2": Family(qkv_bias=True, output_bias=False),
    "llama": Family(windowed=False),
    "mistral": Family(qkv_bias=False, output_bias=False),
}


def read_base(theirs: dict[str, Any], family: str) -> tuple[dict[str, Any], Any]:
    """Fields for everything except the pattern, and transformers' own configuration with its defaults."""
    base: Any = CONFIG_MAPPING[family].from_dict(theirs | {"model_type": family})
    if getattr(base, "mlp_bias", False):
        raise InputError("mlp_bias: MLPs with biases are not supported")
    rope = dict(base.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor: heads rotated in part are not supported")
    kinds, bias = FAMILIES[family], bool(getattr(base, "attention_bias", False))
    fields = {ours: getattr(base, name) for ours, name in SHARED.items()}
    fields |= {
        "head_dim": getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
        "rope_theta": float(theta),
        "rope_options": None if kind == "default" else rope,
        "qk_norm": kinds.qk_norm,
        "attention_bias": bias if kinds.qkv_bias is None else kinds.qkv_bias,
        "attention_output_bias": bias if kinds.output_bias is None else kinds.output_bias,
    }
    if family == "qwen3_moe":
        fields["moe"] = {name: getattr(base, name) for name in EXPERTS} | {
            "layers": [
                layer
                for layer in range(base.num_hidden_layers)
                if layer not in base.mlp_only_layers and (layer + 1) % base.decoder_sparse_step == 0
            ]
        }
    return fields, base


def write_base(config: GKAConfig, family: str) -> dict[str, Any]:
    """transformers' own configuration without a pattern; its heads are those of the softmax layers."""
    heads, kv_heads, head_dim = attention_heads(config)
    values = {theirs: getattr(config, ours) for ours, theirs in SHARED.items()}
    values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    values["rope_parameters"] = (config.rope_options or {"rope_type": "default"}) | {
        "rope_theta": config.rope_theta
    }
    if FAMILIES[family].qkv_bias is None:
        values["attention_bias"] = config.attention_bias
    if config.moe is not None and family == "qwen3_moe":
        layers = range(int(config.num_hidden_layers or 0))
        values |= {name: config.moe[name] for name in EXPERTS}
        values["mlp_only_layers"] = [i for i in layers if i not in config.moe["layers"]]
    written = CONFIG_MAPPING[family](**values).to_dict() | {"dtype": dtype_name(config)}
    return {key: value for key, value in written.items() if key != "_name_or_path"}


def dtype_name(config: GKAConfig) -> str | None:
    """The configuration's dtype as in config.json."""
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _read(family: str, theirs: dict[str, Any]) -> dict[str, Any]:
    fields, base = read_base(theirs, family)
    layers, window = int(base.num_hidden_layers), getattr(base, "sliding_window", None)
    if not FAMILIES[family].windowed or window is None:
        kinds = ["full_attention"] * layers
    else:
        kinds = getattr(base, "layer_types", None) or ["sliding_attention"] * layers
    fields["mixers"] = [_SLIDING[kind] for kind in kinds]
    if "swa" in fields["mixers"]:
        fields["sliding_window"] = window
    return fields


def _write(family: str, config: GKAConfig) -> dict[str, Any]:
    values = write_base(config, family)
    windowed = "swa" in config.pattern
    if "sliding_window" in values:
        values["sliding_window"] = config.sliding_window if windowed else None
    if "use_sliding_window" in values:
        values["use_sliding_window"] = windowed
    if "layer_types" in values:
        values["layer_types"] = config.layer_types
    architecture = type(CONFIG_MAPPING[family]()).__name__.removesuffix("Config") + "ForCausalLM"
    return values | {"architectures": [architecture]}


def _format(family: str) -> Format:
    return Format(
        name=family,
        model_type=family,
        native=True,
        fields=partial(_read, family),
        config=partial(_write, family),
        mixers={"attention": ("self_attn", {}), "swa": ("self_attn", {})},
        unused=(r"rotary_emb\.inv_freq$",),
    )


FORMATS = tuple(map(_format, FAMILIES))
