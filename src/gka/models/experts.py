"""Mixture-of-experts MLPs: transformers' own block, that of Qwen3-MoE."""

from typing import Any

from torch import nn

from gka.errors import InputError
from gka.models.fields import GKAFields

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
    """The block: a router `gate` and `experts`, [B,T,hidden_size] to the same. No balancing loss is added."""
    from transformers import Qwen3MoeConfig, conversion_mapping
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    values: dict[str, Any] = {k: v for k, v in (config.moe or {}).items() if k != "layers"}
    carrier = Qwen3MoeConfig(hidden_size=config.hidden_size, hidden_act=config.hidden_act, **values)
    block = Qwen3MoeSparseMoeBlock(carrier)
    for part in (block.gate, block.experts):
        part.starts_normal = True  # pyright: ignore[reportArgumentType]
    # on disk experts lie one by one, in memory stacked: transformers' loader knows how, by the model's type
    stacking: Any = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    conversion_mapping.register_checkpoint_conversion_mapping(
        config.model_type, stacking, overwrite=True
    )
    return block


def check_experts(config: GKAFields) -> None:
    """Raise `InputError` if `moe` lacks a field, has one too many, or a value that does not fit."""
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
