"""Stage 1: the new mixers learn to reproduce the attention's output.

With x_l the teacher's normalised input of layer l, a_l its attention and m_l the new mixer, the error

    e_l = |m_l(x_l) - a_l(x_l)|^2 / |a_l(x_l)|^2        (mixer outputs, before the residual addition)

is 1 for an output of zero and 0 for an equal one. Layers are independent, as each sees the teacher's input.
With h and h' the last hidden states of the teacher and of the whole hybrid,

    e_end = |h' - h|^2 / |h|^2,        loss = layer_weight mean_l e_l + end_weight e_end.

Teacher and hybrid are one model in memory; only the replaced layers have both mixers.
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
    """The new mixers as a module to train; its checkpoints hold nothing else.

    Args:
        hybrid: the hybrid model; only the mixers of the replaced layers are trained.
        attention: the replaced attention modules, by layer.
        layer_weight, end_weight: weights of the two errors.
        recompute: what the backward pass of e_end recomputes of the hybrid's layers; values as of the
            setting `gradient_checkpointing`.
    """

    # Makes the Trainer average the loss over the forward passes of a step.
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
        # A tuple keeps them from becoming submodules: they are not saved, counted or trained.
        self._rest = (hybrid.model, dict(attention))
        self.layer_weight, self.end_weight = layer_weight, end_weight
        self.checkpointing = checkpoint_arguments(recompute)
        self.mixers = nn.ModuleDict(
            {str(layer): hybrid.model.layers[layer].mixer for layer in attention}  # pyright: ignore[reportArgumentType]
        )

    def blocks(self) -> list[nn.Module]:
        """The modules that the errors call, for `gka.training.compilation`."""
        body, attention = self._rest
        layers: list[Any] = list(body.layers)
        last = len(layers) if self.end_weight else max(attention) + 1
        mixers = [layer.mixer for layer in layers[:last]]
        return [*mixers, *attention.values(), *(layer.mlp for layer in layers[:last])]

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss and the layers' errors, both in float32.

        Args:
            input_ids: [B,T].
            labels: part of every block; unused, as the errors are over all tokens.
            cu_seqlens: bounds of packed sequences, [N+1], with B = 1.

        Returns:
            `loss`, a scalar, and `layers` [replaced layers], the e_l, detached.
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
        """e_l of every replaced layer, and the teacher's last hidden states unless end_weight is 0."""
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
        """e_end; gradients flow through all layers from the first replaced one on, to new mixers only."""
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
    """|given - expected|^2 / |expected|^2 over all elements, in float32."""
    given, expected = given.float(), expected.float()
    return (given - expected).square().mean() / expected.square().mean().clamp_min(1e-12)


def freeze_others(hybrid: GKAForCausalLM, attention: Mapping[int, SoftmaxAttention]) -> None:
    """Freeze all parameters except the new mixers'."""
    hybrid.requires_grad_(False)
    for layer, old in attention.items():
        old.requires_grad_(False)
        hybrid.model.layers[layer].mixer.requires_grad_(True)


def _mixed(mixer: Any, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return mixer(x, cu_seqlens=cu_seqlens)[0]


def _run(layer: Any, hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    hidden = hidden + _mixed(layer.mixer, layer.input_layernorm(hidden), cu_seqlens)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
