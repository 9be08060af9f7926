"""Stage 1: the new mixers learn to give the hidden states that the attention gave.

With x_l the normalised hidden states that the teacher's layer l sees, a_l its attention, m_l the new mixer,

    e_l = |m_l(x_l) - a_l(x_l)|^2 / |a_l(x_l)|^2        (the hidden states after the mixer, before the MLP)

is 1 for a mixer that gives nothing and 0 for one that gives the same. The layers do not depend on each other.
At the end of the model, h and h' the last hidden states of the teacher and of the hybrid as a whole,

    e_end = |h' - h|^2 / |h|^2,        loss = layer_weight mean_l e_l + end_weight e_end.

Teacher and hybrid are one model in memory: they differ in the mixers of these layers, of which both are kept.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gka.layers import SoftmaxAttention
from gka.models import GKAForCausalLM
from gka.models.recomputation import checkpoint_arguments


class Matching(nn.Module):
    """The new mixers as a module to train; a checkpoint of it holds them and nothing else.

    Args:
        hybrid: the hybrid model; only the mixers of the replaced layers are trained.
        attention: the attention modules that were in their places, by layer.
        layer_weight, end_weight: of the two errors.
        recompute: what the backward pass recomputes of the hybrid's layers, as the setting
            `gradient_checkpointing`; concerns e_end.
    """

    # The Trainer then divides by the number of forward passes of a step: the loss is a mean of them.
    accepts_loss_kwargs = False

    def __init__(
        self,
        hybrid: GKAForCausalLM,
        attention: Mapping[int, SoftmaxAttention],
        layer_weight: float = 1.0,
        end_weight: float = 0.0,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        # In a tuple, so that they are no submodules: neither saved, nor counted, nor trained.
        self._rest = (hybrid.model, dict(attention))
        self.layer_weight, self.end_weight = layer_weight, end_weight
        self.checkpointing = checkpoint_arguments(recompute)
        self.mixers = nn.ModuleDict(
            {str(layer): hybrid.model.layers[layer].mixer for layer in attention}  # pyright: ignore[reportArgumentType]
        )

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Both errors.

        Args:
            input_ids: [B,T].
            labels: part of every block, and of no concern here: every token has hidden states.
            cu_seqlens: bounds of packed sequences, [N+1], with B = 1.

        Returns:
            `loss`, and `layers` [replaced layers], the e_l, detached.
        """
        body, _ = self._rest
        with torch.no_grad():
            start = body.embed_tokens(input_ids)
        errors, last = self._layers(start, cu_seqlens)
        loss = self.layer_weight * errors.mean()
        if self.end_weight:
            assert last is not None
            loss = loss + self.end_weight * self._end(start, last, cu_seqlens)
        return {"loss": loss, "layers": errors.detach()}

    def _layers(self, hidden: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """e_l of every replaced layer, and the teacher's last hidden states if the end is matched too."""
        body, attention = self._rest
        errors, last = [], max(attention)
        for number, layer in enumerate(body.layers):
            block: Any = layer
            with torch.no_grad():
                x = block.input_layernorm(hidden)
                mixed = _mixed(attention.get(number, block.mixer), x, cu_seqlens)
            if number in attention:
                errors.append(relative_error(_mixed(block.mixer, x, cu_seqlens), mixed))
            if number == last and not self.end_weight:
                return torch.stack(errors), None
            with torch.no_grad():
                hidden = hidden + mixed
                hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        with torch.no_grad():
            return torch.stack(errors), body.norm(hidden)

    def _end(self, hidden: Tensor, expected: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """e_end; gradients flow through every layer, to the new mixers only."""
        body, attention = self._rest
        first = min(attention)
        for number, layer in enumerate(body.layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= first):
                if self.checkpointing is not None and number >= first:
                    hidden = checkpoint(_run, layer, hidden, cu_seqlens, **self.checkpointing)  # pyright: ignore[reportAssignmentType]
                else:
                    hidden = _run(layer, hidden, cu_seqlens)
        return relative_error(body.norm(hidden), expected)


def relative_error(given: Tensor, expected: Tensor) -> Tensor:
    """|given - expected|^2 / |expected|^2 over everything, float32 or better."""
    given, expected = given.float(), expected.float()
    return (given - expected).square().mean() / expected.square().mean().clamp_min(1e-12)


def freeze_others(hybrid: GKAForCausalLM, attention: Mapping[int, SoftmaxAttention]) -> None:
    """Let gradients reach the new mixers alone."""
    hybrid.requires_grad_(False)
    for layer, old in attention.items():
        old.requires_grad_(False)
        hybrid.model.layers[layer].mixer.requires_grad_(True)


def _mixed(mixer: Any, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return mixer(x, cu_seqlens=cu_seqlens)[0]


def _run(layer: Any, hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    hidden = hidden + _mixed(layer.mixer, layer.input_layernorm(hidden), cu_seqlens)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
