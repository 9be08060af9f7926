"""Tokens and numbers of other ranks: the halo before a rank's tokens, all earlier tokens, and sums.

Every function runs its collective on every rank, forward and backward, also where a rank needs nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gka.ops.context import SequenceContext


class Halo(torch.autograd.Function):
    """The last `width` tokens before this rank's, [B,T,...] -> [B,width,...]; zeros where there are none.

    `aligned`: rows hold their tokens before their padding, which is skipped.
    """

    @staticmethod
    def forward(ctx: Any, context: SequenceContext, x: Tensor, width: int, aligned: bool) -> Tensor:
        ctx.context, ctx.width, ctx.shape = context, width, x.shape
        ctx.aligned = aligned and context.lengths is not None
        every = context.gather(_tail(context, x, width, ctx.aligned))
        if ctx.aligned:
            ranks, places, there = context.halo_places(width)
            found = every[ranks, torch.arange(len(x), device=x.device)[:, None], places]
            return found.masked_fill(~_widen(there, found), 0)
        out = x.new_zeros(len(x), width, *x.shape[2:])
        for rank, theirs, mine in _overlaps(context, width):
            out[:, mine] = every[rank][:, theirs]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), context, width = grads, ctx.context, ctx.width
        wide = torch.promote_types(grad.dtype, torch.float32)
        owed = grad.new_zeros(context.ranks, *grad.shape, dtype=wide)
        if ctx.aligned:
            ranks, places, there = context.halo_places(width)
            rows = torch.arange(len(grad), device=grad.device)[:, None].expand_as(ranks)
            sent = grad.to(wide).masked_fill(~_widen(there, grad), 0)
            owed.index_put_((ranks, rows, places), sent, accumulate=True)
        else:
            for rank, theirs, mine in _overlaps(context, width):
                owed[rank][:, theirs] = grad[:, mine].to(wide)
        of_tail = context.reduce_scatter(owed).to(grad.dtype)
        return None, _tail_back(context, of_tail, ctx.shape, ctx.aligned), None, None


def halo(context: SequenceContext, x: Tensor, width: int, *, aligned: bool) -> Tensor:
    """`Halo`: the last `width` tokens before this rank's [B,width,...]; every rank calls it alike."""
    return Halo.apply(context, x, width, aligned)


def _widen(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(*mask.shape, *(1 for _ in like.shape[2:]))


def _overlaps(context: SequenceContext, width: int) -> list[tuple[int, slice, slice]]:
    """(rank, places in its tail, places in the halo) of the tokens begin - width .. begin - 1."""
    found, end, rank = [], width, context.rank
    while rank > 0 and end > 0:
        rank -= 1
        count = min(context.tokens(rank), end)
        found.append((rank, slice(width - count, width), slice(end - count, end)))
        end -= count
    return found


def _tail(context: SequenceContext, x: Tensor, width: int, aligned: bool) -> Tensor:
    """The last `width` tokens of each row, behind zeros where there are fewer."""
    x = pad(x.flatten(2), (0, 0, width, 0)).unflatten(-1, x.shape[2:])
    if not aligned:
        return x[:, -width:].contiguous()
    return x[_tail_places(context, width, x.device)]


def _tail_places(
    context: SequenceContext, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows and places of the tail in rows that `width` zeros were put before."""
    assert context.lengths is not None
    rows = torch.arange(len(context.lengths), device=device)[:, None]
    return rows, context.lengths[:, None] + torch.arange(width, device=device)


def _tail_back(context: SequenceContext, grad: Tensor, shape: torch.Size, aligned: bool) -> Tensor:
    """The adjoint of `_tail`."""
    width = grad.shape[1]
    out = grad.new_zeros(shape[0], width + shape[1], *shape[2:])
    if aligned:
        out[_tail_places(context, width, grad.device)] = grad
    else:
        out[:, -width:] = grad
    return out[:, width:]


class Gathered(torch.autograd.Function):
    """All ranks' tokens up to this rank's last, [B,T,...] -> [B,end,...]; gradients add up in float32."""

    @staticmethod
    def forward(ctx: Any, context: SequenceContext, x: Tensor) -> Tensor:
        ctx.context = context
        short = context.longest - x.shape[1]
        every = context.gather(pad(x.flatten(2), (0, 0, 0, short)).unflatten(-1, x.shape[2:]))
        return torch.cat([every[r][:, : context.tokens(r)] for r in range(context.rank + 1)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), context = grads, ctx.context
        wide = torch.promote_types(grad.dtype, torch.float32)
        shape = (context.ranks, len(grad), context.longest, *grad.shape[2:])
        owed = grad.new_zeros(shape, dtype=wide)
        begin = 0
        for rank in range(context.rank + 1):
            count = context.tokens(rank)
            owed[rank][:, :count] = grad[:, begin : begin + count]
            begin += count
        mine = context.reduce_scatter(owed)[:, : context.tokens(context.rank)]
        return None, mine.to(grad.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum of every rank's number, the same on all ranks.

    Its gradient is that of the sum of all ranks' results, so that gradients averaged over the ranks, as DDP
    and FSDP do, are those of the sum.
    """

    @staticmethod
    def forward(ctx: Any, context: SequenceContext, x: Tensor) -> Tensor:
        ctx.ranks = context.ranks
        return context.gather(x).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0] * ctx.ranks
