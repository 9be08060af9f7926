"""A model's call on one part of rows that are split over ranks: what it takes, its targets and its loss."""

from typing import Any

import torch
from torch import Tensor, nn

from gka.errors import InputError
from gka.layers import SoftmaxAttention
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models.loss import IGNORE_INDEX, next_token_targets
from gka.ops.context import SequenceContext


def split_arguments(context: SequenceContext, layers: nn.ModuleList) -> dict[str, SequenceContext]:
    """What every layer gets for rows that are split over ranks.

    Raises:
        InputError: a layer's mixer cannot run a part of a row; the message names it.
    """
    for number, layer in enumerate(layers):
        mixer: Any = layer.mixer
        if not isinstance(mixer, RecurrentMixer | SoftmaxAttention):
            raise InputError(
                f"context: layer {number} has a {type(mixer).__name__}, which no rank can run on a part of a "
                "row: train with whole rows (cp = 1)."
            )
    return {"context": context}


def split_targets(context: SequenceContext, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label that each of this rank's tokens predicts, and the number of targets of all ranks.

    The last token predicts the next rank's first one, unless a document begins there.

    Args:
        labels: [B,T] of this rank's tokens, -100 for positions that are not predicted.

    Returns:
        Targets [B,T], and their number, an integer on the labels' device.
    """
    targets = next_token_targets(labels, context.cu_seqlens)
    count = (targets != IGNORE_INDEX).sum().to(labels.dtype)
    every = context.gather(torch.cat([count[None], labels[:, 0]]))
    total = every[:, 0].sum()
    for rank in range(1, context.ranks):
        if context.firsts[rank] == context.ranges[rank][0]:
            continue  # a document begins there
        total = total + (every[rank, 1:] != IGNORE_INDEX).sum()
        if rank == context.rank + 1:
            targets = torch.cat([targets[:, :-1], every[rank, 1:, None]], 1)
    return targets, total


def sum_over_ranks(context: SequenceContext, x: Tensor) -> Tensor:
    """The sum of every rank's number, the same on all ranks; its gradient is times the number of ranks.

    So gradients that are averaged over the ranks, as FSDP and DDP do, are those of the sum.
    """
    return _SumOverRanks.apply(context, x)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: SequenceContext, x: Tensor) -> Tensor:
        ctx.ranks = context.ranks
        return context.gather(x).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0] * ctx.ranks
