"""Earlier tokens that a rank's layer reads: those of a convolution, of a window, or of a whole document.

Every rank sends to each later one the tokens that it lacks, in one all-to-all. A gather of all tokens would
bring every rank what most do not read: a convolution reads three tokens, a window reaches over few ranks, and
the first rank of a causal attention, or of a new document, reads nothing. Gradients come back the same way,
and each rank adds those of its tokens up in float32 or better.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gka.ops.context import SequenceContext


def halos(context: SequenceContext, width: int | None) -> list[int]:
    """Tokens that each rank reads before its own: `width`, or all for None, of its first token's document."""
    before = [begin - a for (begin, _), a in zip(context.ranges, context.firsts, strict=True)]
    return before if width is None else [min(width, n) for n in before]


@torch.compiler.disable(reason="ranks exchange tokens: a graph cannot hold the collective")
def with_halo(context: SequenceContext, x: Tensor, width: int | None) -> Tensor:
    """This rank's tokens behind the earlier ones that it reads, [B,T,...] -> [B,halo+T,...].

    The halo has `halos(context, width)[rank]` tokens. Every rank calls it, forward and backward.
    """
    return WithHalo.apply(context, x, halos(context, width))


class WithHalo(torch.autograd.Function):
    """`with_halo`, with the number of tokens that every rank reads before its own."""

    @staticmethod
    def forward(ctx: Any, context: SequenceContext, x: Tensor, before: list[int]) -> Tensor:
        ctx.context, ctx.before = context, before
        sent, received = _shares(context, before)
        # a later rank reads the last tokens of this one
        owed = [x[:, x.shape[1] - n :] for n in sent]
        return torch.cat([*_exchanged(context, owed, received, x), x], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("A sequence split over ranks has no second derivative.")
        (grad,), context = grads, ctx.context
        sent, received = _shares(context, ctx.before)
        halo = ctx.before[context.rank]
        own = grad[:, halo:].clone(memory_format=torch.contiguous_format)
        found = _exchanged(context, grad[:, :halo].split(received, 1), sent, own)
        tail = own[:, own.shape[1] - max(sent) :]
        total = tail.to(torch.promote_types(grad.dtype, torch.float32))
        for part in found:
            total[:, total.shape[1] - part.shape[1] :] += part
        tail.copy_(total)
        return None, own, None


def _shares(context: SequenceContext, before: list[int]) -> tuple[list[int], list[int]]:
    """Tokens that this rank sends to every rank, and those that it receives from each."""
    ranks, mine = range(context.ranks), context.rank
    sent = [_share(context, before, mine, reader) for reader in ranks]
    return sent, [_share(context, before, owner, mine) for owner in ranks]


def _share(context: SequenceContext, before: list[int], owner: int, reader: int) -> int:
    """Tokens of `owner` that `reader` reads, its last ones."""
    if owner >= reader:
        return 0
    begin, end = context.ranges[owner]
    first = context.ranges[reader][0] - before[reader]
    return max(0, end - max(begin, first))


def _exchanged(
    context: SequenceContext, sent: Sequence[Tensor], received: list[int], like: Tensor
) -> list[Tensor]:
    """Send [B,n,...] to each rank; what came from each, [B,received[r],...]."""
    flat = torch.cat([part.flatten() for part in sent])
    each = like[:, :1].numel()
    found = context.exchange(flat, [p.numel() for p in sent], [n * each for n in received])
    parts = found.split([n * each for n in received])
    return [
        part.view(len(like), n, *like.shape[2:]) for part, n in zip(parts, received, strict=True)
    ]
