"""The released hybrid models: a transformers decoder with some attention layers replaced."""

from functools import partial
from typing import Any

from gka.checkpoints.format import Format
from gka.checkpoints.formats.plain import read_base, write_base
from gka.errors import InputError
from gka.layers.parts.heads import split_heads
from gka.models.configuration import GKAConfig

SYMBOLS = {"*": "attention", "GKA": "gka", "SWA": "swa", "GDN": "gated_deltanet"}
_CLASSES = {
    "qwen3": "HybridQwen3ForCausalLM",
    "qwen2": "HybridQwen2ForCausalLM",
    "llama": "HybridLlamaForCausalLM",
    "qwen3_moe": "HybridQwen3MoeForCausalLM",
}
# Our option of the layer: (theirs, their default).
_GKA = {
    "ridge_ratio": ("ridge_strength", 0.02),
    "num_iter": ("num_iter", 30),
    "conv_size": ("conv_size", 4),
    "use_alpha_connection": ("use_alpha_connection", True),
    "use_v_conv": ("use_v_conv", True),
    "use_forgetting_gate": ("use_forgetting_gate", True),
    "use_forgetting_gate_kk": ("use_forgetting_gate_kk", True),
    "use_beta_gate": ("use_beta_gate", True),
    "use_gate": ("use_gate", True),
    "gla_rescale": ("gla_rescale", True),
    "kv_rank": ("kv_proj_rank", None),
    "kv_mix": ("kv_learnable_residual", False),
}
_GKA_HEADS = ("num_q_heads", "num_k_heads", "num_v_heads", "head_dim")
# bp_lambda: here gradients reach lambda. chunk_size: that of their kernels.
_GKA_FIXED = {"solver_type": "chebyshev", "bp_lambda": True}
_GKA_KEYS = {key for key, _ in _GKA.values()} | {
    *_GKA_HEADS, *_GKA_FIXED, "hidden_size", "norm_eps", "chunk_size",
}  # fmt: skip
_GDN = {"use_gate": True, "conv_size": 4}
_GDN_FIXED = {
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "conv_bias": False,
    "kv_proj_rank": None,
}
_GDN_KEYS = {
    *_GDN,
    *_GDN_FIXED,
    "norm_eps",
    "hidden_size",
    "kv_learnable_residual",
    *_GKA_HEADS,
} | {
    "use_state_passing_sp",  # their training's split of a sequence over devices
}
_EXPANSION = {
    f"{name}_expand.{ours}": theirs
    for name in "kv"
    for ours, theirs in (
        ("down.", f"proj_{name}.linearA."),
        ("up.", f"proj_{name}.linearB."),
        ("mix", f"{name}_rep"),
    )
}


def read(family: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """Their configuration as fields of `GKAConfig`."""
    pattern = _mixers(theirs)
    plain = {k: v for k, v in theirs.items() if k not in ("layer_types", "hybrid_override_pattern")}
    fields, base = read_base(plain, family)
    if base.num_hidden_layers != len(pattern):
        raise InputError(
            f"hybrid_override_pattern names {len(pattern)} layers, but num_hidden_layers is "
            f"{base.num_hidden_layers}"
        )
    fields |= {
        "mixers": pattern,
        "attention_num_heads": fields["num_heads"],
        "attention_num_kv_heads": fields["num_kv_heads"],
        "attention_head_dim": fields["head_dim"],
    }
    fields["mixer_overrides"] = {}
    if "swa" in pattern:
        fields["sliding_window"] = _window(theirs)
    if "gka" in pattern:
        _read_gka(theirs, fields)
    if "gated_deltanet" in pattern:
        _read_gdn(theirs, fields)
    fields["mixer_overrides"] = fields["mixer_overrides"] or None
    return fields


def _mixers(theirs: dict[str, Any]) -> list[str]:
    text = theirs.get("hybrid_override_pattern") or "-".join(theirs.get("layer_types") or ())
    if not text:
        raise InputError("hybrid_override_pattern: missing; expected symbols such as '*-GKA-*-GKA'")
    for symbol in text.split("-"):
        if symbol in SYMBOLS:
            continue
        if "*" in symbol or ">" in symbol:
            raise InputError(
                f"hybrid_override_pattern: {symbol!r} is a fused layer of the distillation stage, two mixers "
                "side by side; unfuse the checkpoint first"
            )
        raise InputError(
            f"hybrid_override_pattern: unknown layer {symbol!r}; known: {', '.join(SYMBOLS)}"
        )
    symbols, listed = text.split("-"), theirs.get("layer_types") or []
    if set(listed) <= set(SYMBOLS) and listed and listed != symbols:
        raise InputError(f"layer_types {listed} contradict hybrid_override_pattern {text!r}")
    return [SYMBOLS[symbol] for symbol in symbols]


def _window(theirs: dict[str, Any]) -> int:
    window = (theirs.get("swa_config") or {}).get("window_size", theirs.get("sliding_window"))
    if not isinstance(window, int):
        raise InputError(f"swa_config: window_size must be a number of tokens, got {window!r}")
    return window


def _read_gka(theirs: dict[str, Any], fields: dict[str, Any]) -> None:
    given = (theirs.get("gka_config") or {}) | (theirs.get("gka_overrides") or {})
    _check_table("gka_config", given, _GKA_KEYS, _GKA_FIXED, fields["hidden_size"])
    fields |= {ours: given.get(name, default) for ours, (name, default) in _GKA.items()}
    q, k, v, head_dim = _heads(given, fields)
    fields |= {"num_heads": q, "head_dim": head_dim, "num_kv_heads": None}
    if k == v and q % k == 0:
        fields["num_kv_heads"] = k
    else:
        fields |= {"num_k_heads": k, "num_v_heads": v}
    _override(fields, "gka", "norm_eps", given.get("norm_eps", 1e-6), fields["norm_eps"])


def _read_gdn(theirs: dict[str, Any], fields: dict[str, Any]) -> None:
    given = theirs.get("gdn_config") or {}
    _check_table("gdn_config", given, _GDN_KEYS, _GDN_FIXED, fields["hidden_size"])
    q, k, v, head_dim = _heads(given, fields)
    if k != v:
        raise InputError(f"gdn_config: num_k_heads = {k} and num_v_heads = {v} must be equal")
    values = {name: given.get(name, default) for name, default in _GDN.items()}
    values |= {"num_heads": q, "num_kv_heads": k, "head_dim": head_dim}
    for option, value in (values | {"norm_eps": given.get("norm_eps", 1e-5)}).items():
        usual = fields.get(option, _GDN.get(option))
        _override(fields, "gated_deltanet", option, value, usual)


def _heads(given: dict[str, Any], fields: dict[str, Any]) -> tuple[int, int, int, int]:
    """Query, key and value heads and their size; the attention's if the table has none."""
    heads, kv_heads = fields["attention_num_heads"], fields["attention_num_kv_heads"]
    usual = (heads, kv_heads, kv_heads, fields["attention_head_dim"])
    q, k, v, head_dim = (
        default if given.get(key) is None else given[key]
        for key, default in zip(_GKA_HEADS, usual, strict=True)
    )
    return q, k, v, head_dim


def _override(fields: dict[str, Any], mixer: str, option: str, value: Any, usual: Any) -> None:
    if value != usual:
        fields["mixer_overrides"].setdefault(mixer, {})[option] = value


def _check_table(
    table: str, given: dict[str, Any], known: set[str], fixed: dict[str, Any], hidden_size: int
) -> None:
    for key, value in given.items():
        if key not in known:
            raise InputError(f"{table}: unknown key {key!r}; known: {', '.join(sorted(known))}")
        if key in fixed and value != fixed[key]:
            raise InputError(f"{table}: {key} = {value!r} is not supported, only {fixed[key]!r}")
    if given.get("hidden_size", hidden_size) != hidden_size:
        raise InputError(
            f"{table}: hidden_size = {given['hidden_size']} differs from the model's {hidden_size}"
        )


def write(family: str, config: GKAConfig) -> dict[str, Any]:
    """A configuration of the released format."""
    names = {mixer: symbol for symbol, mixer in SYMBOLS.items()}
    symbols = [names[mixer] for mixer in config.pattern]
    values = write_base(config, family)
    values |= {
        "model_type": f"hybrid_{family}",
        "architectures": [_CLASSES[family]],
        "hybrid_override_pattern": "-".join(symbols),
        "layer_types": symbols,
    }
    if "swa" in config.pattern:
        values["swa_config"] = {"window_size": config.sliding_window}
    if "gka" in config.pattern:
        values["gka_config"] = _write_gka(config)
    if "gated_deltanet" in config.pattern:
        # Its layers have no such counts.
        options = _options(config, "gated_deltanet") | {"num_k_heads": None, "num_v_heads": None}
        values["gdn_config"] = _GDN_FIXED | _counts(options) | {
            key: options[key] for key in (*_GDN, "norm_eps", "hidden_size")
        }  # fmt: skip
    return values


def _write_gka(config: GKAConfig) -> dict[str, Any]:
    options = _options(config, "gka")
    if not options["use_forgetting_gate"]:
        raise InputError(
            "use_forgetting_gate: the released layers store the weights of a decay in any case, and a model "
            "without one has none to store"
        )
    table = {name: options[ours] for ours, (name, _) in _GKA.items()}
    common = {"hidden_size": config.hidden_size, "norm_eps": options["norm_eps"], "chunk_size": 64}
    return table | _counts(options) | common | _GKA_FIXED


def _options(config: GKAConfig, mixer: str) -> dict[str, Any]:
    return vars(config) | (config.mixer_overrides or {}).get(mixer, {})


def _counts(options: dict[str, Any]) -> dict[str, Any]:
    counts = split_heads(
        options["num_heads"],
        options["num_kv_heads"],
        options["num_v_heads"],
        options["num_k_heads"],
    )
    return {
        "num_q_heads": counts["num_heads"],
        "num_k_heads": counts["num_k_heads"],
        "num_v_heads": counts["num_v_heads"],
        "head_dim": options["head_dim"],
    }


def _format(family: str) -> Format:
    return Format(
        name=f"hybrid_{family}",
        model_type=f"hybrid_{family}",
        fields=partial(read, family),
        config=partial(write, family),
        mixers={
            "attention": ("self_attn", {}),
            "swa": ("swa", {}),
            "gka": ("gka", _EXPANSION),
            "gated_deltanet": ("gdn", {"a_proj.": "gk_proj."}),
        },
        # The layers have the weights of a decay even if they do not use it.
        unused=(r"rotary_emb\.inv_freq$", r"\.(A_log|dt_bias|a_proj\.weight)$"),
    )


FORMATS = tuple(map(_format, _CLASSES))
