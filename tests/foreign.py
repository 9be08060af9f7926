"""Tiny checkpoints in foreign formats, written from the formats' description alone: names, shapes, numbers.

Nothing of `gka` is used here, so what these files hold is independent of how they are read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, WIDTH, MLP, HEADS, KV_HEADS, HEAD = 97, 32, 48, 4, 2, 8
Shapes = dict[str, tuple[int, ...]]


def _attention(at: str, bias: bool = False, qk_norm: bool = True) -> Shapes:
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    shapes: Shapes = {
        f"{at}q_proj.weight": (q, WIDTH),
        f"{at}k_proj.weight": (kv, WIDTH),
        f"{at}v_proj.weight": (kv, WIDTH),
        f"{at}o_proj.weight": (WIDTH, q),
    }
    if bias:
        shapes |= {f"{at}q_proj.bias": (q,), f"{at}k_proj.bias": (kv,), f"{at}v_proj.bias": (kv,)}
    if qk_norm:
        shapes |= {f"{at}q_norm.weight": (HEAD,), f"{at}k_norm.weight": (HEAD,)}
    return shapes


def _recurrent(at: str, decay: str, kv_heads: int = KV_HEADS, v_head: int = HEAD) -> Shapes:
    q, k, v, out = HEADS * HEAD, kv_heads * HEAD, kv_heads * v_head, HEADS * v_head
    shapes: Shapes = {f"{at}A_log": (HEADS,), f"{at}dt_bias": (HEADS,)}
    for name, width in (("q", q), ("k", k), ("v", v)):
        shapes[f"{at}{name}_proj.weight"] = (width, WIDTH)
        shapes[f"{at}{name}_conv1d.weight"] = (width, 1, 4)
    return shapes | {
        f"{at}{decay}.weight": (HEADS, WIDTH),
        f"{at}b_proj.weight": (HEADS, WIDTH),
        f"{at}g_proj.weight": (out, WIDTH),
        f"{at}o_norm.weight": (v_head,),
        f"{at}o_proj.weight": (WIDTH, out),
    }


def _gka(at: str, kv_heads: int = KV_HEADS) -> Shapes:
    return _recurrent(at, "a_proj", kv_heads) | {
        f"{at}b_proj.bias": (HEADS,),
        f"{at}alpha_proj.weight": (HEADS, WIDTH),
        f"{at}alpha_proj.bias": (HEADS,),
    }


def _expansion(at: str, rank: int, mix: bool) -> Shapes:
    shapes: Shapes = {}
    for name in "kv":
        shapes[f"{at}proj_{name}.linearA.weight"] = (rank, KV_HEADS * HEAD)
        shapes[f"{at}proj_{name}.linearB.weight"] = (HEADS * HEAD, rank)
        if mix:
            shapes[f"{at}{name}_rep"] = (HEADS, KV_HEADS)
    return shapes


def _mlp(at: str, width: int = MLP) -> Shapes:
    sides = {"gate_proj": (width, WIDTH), "up_proj": (width, WIDTH), "down_proj": (WIDTH, width)}
    return {f"{at}{name}.weight": shape for name, shape in sides.items()}


def numbers(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a size at which a model is lively; norms around one."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        norm = "norm" in name
        weights[name] = (1 + 0.1 * drawn if norm else 0.3 * drawn).to(dtype)
    return weights


def write(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1
) -> Path:
    """A folder as a library saves it; with several shards, an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, places = list(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hybrid_config(family: str, pattern: str, **changes: Any) -> dict[str, Any]:
    """config.json of a released hybrid model."""
    classes = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "qwen3_moe": "Qwen3Moe"}
    config = {
        "model_type": f"hybrid_{family}", "architectures": [f"Hybrid{classes[family]}ForCausalLM"],
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": MLP, "head_dim": HEAD,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5,
        "num_hidden_layers": len(pattern.split("-")), "hybrid_override_pattern": pattern,
        "layer_types": pattern.split("-"), "hidden_act": "silu", "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "float32",
        "tie_word_embeddings": False, "transformers_version": "5.3.0", "use_cache": True,
        "sliding_window": None, "use_sliding_window": False, "attention_dropout": 0.0,
    }  # fmt: skip
    if "GKA" in pattern:
        config["gka_config"] = {"num_iter": 6, "ridge_strength": 0.03}
    if "GDN" in pattern:
        config["gdn_config"] = {}
    if "SWA" in pattern:
        config["swa_config"] = {"window_size": 5}
    return config | changes


def hybrid_weights(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a released hybrid model with this configuration."""
    family = config["model_type"].removeprefix("hybrid_")
    options = {"bias": family == "qwen2", "qk_norm": family in ("qwen3", "qwen3_moe")}
    gka = config.get("gka_config", {})
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    for layer, symbol in enumerate(config["hybrid_override_pattern"].split("-")):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}input_layernorm.weight": (WIDTH,)}
        shapes |= {f"{at}post_attention_layernorm.weight": (WIDTH,)}
        if family == "qwen3_moe" and layer not in config["mlp_only_layers"]:
            shapes[f"{at}mlp.gate.weight"] = (config["num_experts"], WIDTH)
            for expert in range(config["num_experts"]):
                shapes |= _mlp(f"{at}mlp.experts.{expert}.", config["moe_intermediate_size"])
        else:
            shapes |= _mlp(f"{at}mlp.")
        if symbol == "*":
            shapes |= _attention(f"{at}self_attn.", **options)
        elif symbol == "SWA":
            shapes |= _attention(f"{at}swa.", **options)
        elif symbol == "GDN":
            shapes |= _recurrent(f"{at}gdn.", "gk_proj")
        else:
            shapes |= _gka(f"{at}gka.")
            if gka.get("kv_proj_rank"):
                mix = gka.get("kv_learnable_residual", False)
                shapes |= _expansion(f"{at}gka.", gka["kv_proj_rank"], mix)
    return numbers(shapes, dtype)


def fla_config(kind: str, attention: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of a model of FLA."""
    config = {
        "model_type": kind, "architectures": ["GKAForCausalLM"], "attn_mode": "chunk", "hidden_size": WIDTH,
        "expand_v": 1.0, "head_dim": HEAD, "num_heads": HEADS, "num_v_heads": None, "use_gate": True,
        "conv_size": 4, "max_position_embeddings": 512, "hidden_ratio": 4, "intermediate_size": None,
        "hidden_act": "swish", "num_hidden_layers": 3, "norm_eps": 1e-6, "attn": None, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.02,
        "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True, "vocab_size": VOCABULARY,
        "fuse_linear_cross_entropy": False, "use_l2warp": False, "transformers_version": "5.3.0",
    }  # fmt: skip
    if kind == "gka":
        config |= {"num_kv_heads": KV_HEADS, "ridge_ratio": 0.03, "num_iter": 6}
        config |= dict.fromkeys(("use_beta_gate", "use_alpha_connection", "use_v_conv"), True)
        config |= dict.fromkeys(
            ("use_forgetting_gate", "use_forgetting_gate_kk", "gla_rescale"), True
        )
    else:
        config |= {"use_short_conv": True, "allow_neg_eigval": False, "expand_v": 2.0}
    if attention is not None:
        config["attn"] = fla_attention(attention)
    return config | changes


def fla_attention(layers: list[int], **changes: Any) -> dict[str, Any]:
    """FLA's description of attention layers."""
    usual = {"layers": layers, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "qkv_bias": False,
             "window_size": None, "rope_theta": 10000.0}  # fmt: skip
    return usual | changes


def fla_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a model of FLA with this configuration; its MLP is 256 wide (2/3 of 4 x 32, rounded up)."""
    shapes: Shapes = {"model.embeddings.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    spec = config["attn"] or {"layers": [], "qkv_bias": False}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}attn_norm.weight": (WIDTH,), f"{at}mlp_norm.weight": (WIDTH,)}
        shapes |= _mlp(f"{at}mlp.", 256)
        if layer in spec["layers"]:
            shapes |= _attention(f"{at}attn.", bias=spec["qkv_bias"], qk_norm=False)
        elif config["model_type"] == "gka":
            shapes |= _gka(f"{at}attn.")
        else:
            shapes |= _recurrent(f"{at}attn.", "a_proj", HEADS, 2 * HEAD)
    return numbers(shapes)
