"""Models of FLA (flash-linear-attention): its `gka` and `gated_deltanet`, alone or with attention layers."""

from functools import partial
from typing import Any

from gka.checkpoints.format import Format
from gka.checkpoints.formats.plain import dtype_name
from gka.errors import InputError
from gka.models.configuration import GKAConfig
from gka.models.fields import attention_heads

MARKS = frozenset({"attn_mode", "fuse_norm", "fuse_swiglu", "hidden_ratio", "fuse_cross_entropy"})
"""Keys that only FLA's configurations have: both libraries have a model type "gka"."""

# Names that both have, with FLA's defaults.
_COMMON = {
    "hidden_size": 2048, "use_gate": True, "conv_size": 4, "num_v_heads": None,
    "max_position_embeddings": 2048, "hidden_act": "swish", "norm_eps": 1e-6, "use_cache": True,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.02, "vocab_size": 32000,
}  # fmt: skip
_OWN = {
    "gka": {
        "expand_v": 1.0, "head_dim": 128, "num_heads": 16, "num_kv_heads": None, "use_beta_gate": True,
        "use_alpha_connection": True, "use_v_conv": True, "use_forgetting_gate": True,
        "use_forgetting_gate_kk": True, "gla_rescale": True, "ridge_ratio": 0.02, "num_iter": 30,
        "num_hidden_layers": 24,
    },
    "gated_deltanet": {
        "expand_v": 2.0, "head_dim": 256, "num_heads": 6, "num_hidden_layers": 21,
    },
}  # fmt: skip
# Options that this library lacks, with the values that it supports.
_FIXED = {"use_short_conv": True, "allow_neg_eigval": False, "attnres_block_size": None}
# Options of FLA's computation and training that do not change the model.
_HARMLESS = {
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label",
    "label2id", "is_encoder_decoder", "problem_type", "auto_map", "num_labels", "quantization_config",
}  # fmt: skip
_SPEC = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}
_CLASSES = {"gka": "GKAForCausalLM", "gated_deltanet": "GatedDeltaNetForCausalLM"}


def read(kind: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """Their configuration as fields of `GKAConfig`."""
    usual = _COMMON | _OWN[kind]
    known = {*usual, *_FIXED, *_HARMLESS, "attn", "hidden_ratio", "intermediate_size"}
    for key, value in theirs.items():
        if key not in known and value is not None:
            raise InputError(f"FLA's {kind}: unknown key {key!r} = {value!r}")
        if key in _FIXED and value != _FIXED[key]:
            raise InputError(f"FLA's {kind}: {key} = {value!r} is not supported")
    fields = {key: theirs.get(key, default) for key, default in usual.items()}
    if kind == "gated_deltanet":
        _check_value_heads(fields)
    fields["intermediate_size"] = theirs.get("intermediate_size") or _mlp_width(theirs, fields)
    fields["hidden_act"] = "silu" if fields["hidden_act"] == "swish" else fields["hidden_act"]
    return fields | _read_attention(kind, theirs.get("attn"), fields)


def _mlp_width(theirs: dict[str, Any], fields: dict[str, Any]) -> int:
    """FLA's default: 2/3 hidden_ratio hidden_size, rounded up to a multiple of 256."""
    ratio = 4 if theirs.get("hidden_ratio") is None else theirs["hidden_ratio"]
    return -(-int(fields["hidden_size"] * ratio * 2 / 3) // 256) * 256


def _check_value_heads(fields: dict[str, Any]) -> None:
    if fields["num_v_heads"] not in (None, fields["num_heads"]):
        raise InputError(
            f"FLA's gated_deltanet: num_v_heads = {fields['num_v_heads']} beside num_heads = "
            f"{fields['num_heads']} is not supported: this library's has as many value as key heads"
        )
    fields["num_v_heads"] = None


def _read_attention(kind: str, attn: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The pattern, and the options of its attention layers, which must be the same in all."""
    mixers = [kind] * fields["num_hidden_layers"]
    specs = [attn] if isinstance(attn, dict) else attn or []
    values: list[dict[str, Any]] = []
    for spec in specs:
        if unknown := set(spec) - _SPEC:
            raise InputError(f"attn: unknown keys {', '.join(sorted(unknown))}")
        window, heads = spec.get("window_size"), spec["num_heads"]
        for layer in spec["layers"]:
            if layer not in range(len(mixers)):
                raise InputError(f"attn: layer {layer} lies outside the {len(mixers)} layers")
            mixers[layer] = "attention" if window is None else "swa"
        values.append({
            "attention_num_heads": heads,
            "attention_num_kv_heads": spec.get("num_kv_heads") or heads,
            "attention_head_dim": fields["hidden_size"] // heads,
            "attention_bias": spec.get("qkv_bias", False),
            "rope_theta": float(spec.get("rope_theta") or 10000.0),
        })  # fmt: skip
    windows = {spec.get("window_size") for spec in specs} - {None}
    if len(windows) > 1 or any(v != values[0] for v in values):
        raise InputError("attn: specifications whose options differ are not supported")
    options = values[0] if values else {}
    if windows:
        options["sliding_window"] = windows.pop()
    return {"mixers": mixers, "qk_norm": False} | options


def write(kind: str, config: GKAConfig) -> dict[str, Any]:
    """A configuration for FLA's class."""
    if kind == "gka" and config.num_iter < 1:
        raise InputError("num_iter = 0 (gated linear attention) is refused by FLA's gka")
    values = {key: getattr(config, key) for key in _COMMON | _OWN[kind]}
    if values["hidden_act"] == "silu":
        values["hidden_act"] = "swish"
    return values | {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "attn": _write_attention(config),
        "attn_mode": "chunk",
        "hidden_ratio": None,
        "intermediate_size": config.intermediate_size,
        "fuse_norm": True,
        "dtype": dtype_name(config),
    }


def _write_attention(config: GKAConfig) -> Any:
    heads, kv_heads, _ = attention_heads(config)
    specs = []
    for mixer, window in (("attention", None), ("swa", config.sliding_window)):
        layers = [layer for layer, name in enumerate(config.pattern) if name == mixer]
        if layers:
            specs.append({
                "layers": layers, "num_heads": heads, "num_kv_heads": kv_heads,
                "qkv_bias": config.attention_bias, "window_size": window, "rope_theta": config.rope_theta,
            })  # fmt: skip
    return specs if len(specs) > 1 else next(iter(specs), None)


def _format(name: str, kind: str) -> Format:
    return Format(
        name=name,
        model_type=kind,
        # Ours has the model type "gka" too.
        marks=MARKS if kind == GKAConfig.model_type else frozenset(),
        fields=partial(read, kind),
        config=partial(write, kind),
        mixers={mixer: ("attn", {}) for mixer in (kind, "attention", "swa")},
        top={"model.embed_tokens.": "model.embeddings."},
        block={"input_layernorm.": "attn_norm.", "post_attention_layernorm.": "mlp_norm."},
        unused=(r"rotary\.inv_freq$",),
    )


FORMATS = (_format("fla", "gka"), _format("fla_gated_deltanet", "gated_deltanet"))
