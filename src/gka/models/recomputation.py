"""Selective activation checkpointing: the backward pass recomputes what is cheap and keeps what is dear.

The operators that mix tokens are dear: the solve of Gated KalmaNet, the delta rule, attention. Their outputs
and what their backward passes need are kept: for the solve o and x, [B,T,H,V] and [B,T,H,K] in each layer.
Norms, gates, convolutions and activations are recomputed from the layer's input. So are matrix products,
unless they are kept by choice. Kernels of flash-linear-attention are no operators, and run again.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

import gka.ops.delta_rule
import gka.ops.external_call  # noqa: F401  registers the operators below
from gka.errors import InputError
from gka.models.solver import gka_layers

Contexts = tuple[AbstractContextManager, AbstractContextManager]

SEQUENCE_OPS = frozenset({
    torch.ops.gka.forward.default,
    torch.ops.gka.delta_rule.default,
    torch.ops.gka.flash_qla.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
})  # fmt: skip
"""Operators that mix the tokens of a sequence."""
PRODUCTS = frozenset({
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
})  # fmt: skip
"""Matrix products, those of experts included."""


def _keep_sequence_ops(
    _: SelectiveCheckpointContext, op: Any, *args: Any, **options: Any
) -> CheckpointPolicy:
    kept = op in SEQUENCE_OPS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products(
    _: SelectiveCheckpointContext, op: Any, *args: Any, **options: Any
) -> CheckpointPolicy:
    kept = op in SEQUENCE_OPS or op in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_sequence_ops() -> Contexts:
    """The `context_fn` of torch.utils.checkpoint that keeps the results of `SEQUENCE_OPS` alone."""
    return create_selective_checkpoint_contexts(_keep_sequence_ops)


def keep_products() -> Contexts:
    """The `context_fn` of torch.utils.checkpoint that keeps those of `PRODUCTS` too."""
    return create_selective_checkpoint_contexts(_keep_products)


# Without it torch does not keep compiled graphs on disk. Part of their keys: change it with what is kept.
for _contexts in (keep_sequence_ops, keep_products):
    setattr(_contexts, "cache_hash", f"gka.{_contexts.__name__}.1")  # noqa: B010


def selective_checkpointing(*, products: bool = False) -> dict[str, Any]:
    """Arguments that make gradient checkpointing selective.

    They are torch.utils.checkpoint's, for `gradient_checkpointing_enable` (`activation_checkpointing_enable`
    in newer transformers) and for the Trainer's `gradient_checkpointing_kwargs`. Gradients are those
    without checkpointing. Eagerly every operator passes through Python twice; compiled graphs pay nothing.

    Args:
        products: keep the results of matrix products too, for more memory and less time.

    Returns:
        `use_reentrant` and `context_fn`.

    Example:
        >>> model.gradient_checkpointing_enable(selective_checkpointing())
    """
    return {
        "use_reentrant": False,
        "context_fn": keep_products if products else keep_sequence_ops,
    }


def keep_states(model: nn.Module, keep: bool = True) -> None:
    """Have every GKA layer keep the states at chunk starts for the backward pass, or compute them again.

    The time of a scan is saved for 2 H K (K + V) bytes a chunk of 64 tokens and layer: 134 MB for 8 x 2048
    tokens and 8 heads of 128. Gradients are as in `chunk_gka` with keep_states. Where whole layers are
    recomputed, only one layer's states are there at a time.

    Raises:
        InputError: states are to be kept, and the model has no GKA layer.
    """
    layers = gka_layers(model)
    if keep and not layers:
        raise InputError("keep_states: the model has no GKA layer, whose states could be kept.")
    for layer in layers:
        layer.keep_states = keep


def checkpoint_arguments(how: str) -> dict[str, Any] | None:
    """Arguments of torch.utils.checkpoint by name; None where nothing is recomputed.

    Args:
        how: "none"; "full" recomputes whole layers; "selective" is `selective_checkpointing()`, and
            "selective-products" the same with `products`.

    Raises:
        ValueError: another name.
    """
    if how in ("selective", "selective-products"):
        return selective_checkpointing(products=how == "selective-products")
    known: dict[str, dict[str, Any] | None] = {"none": None, "full": {"use_reentrant": False}}
    if how not in known:
        raise ValueError(
            f"checkpointing is none, full, selective or selective-products; got {how!r}"
        )
    return known[how]
