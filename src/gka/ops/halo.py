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
    return _WithHalo.apply(context, x, halos(context, width))


@torch.compiler.disable(reason="ranks exchange tokens: a graph cannot hold the collective")
def halo_of(
    context: SequenceContext, parts: Sequence[Tensor], width: int, lengths: Tensor | None
) -> list[Tensor]:
    """The earlier tokens alone that this rank reads of each part, [B,T,C] -> [B,halo,C], in one exchange.

    Args:
        lengths: tokens of each row [B], before its padding; None: T.
    """
    count = min(width, parts[0].shape[1])
    tail = torch.cat([last_tokens(x, count, lengths) for x in parts], -1)
    halo = _Halo.apply(context, tail, halos(context, width))
    return list(halo.split([x.shape[-1] for x in parts], -1))


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: SequenceContext, x: Tensor, before: list[int]) -> Tensor:
        ctx.context, ctx.before = context, before
        return torch.cat([send(context, x, before), x], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), context = grads, ctx.context
        halo = ctx.before[context.rank]
        own = grad[:, halo:].clone(memory_format=torch.contiguous_format)
        add_to_last_(own, send_back(context, grad[:, :halo], ctx.before), None)
        return None, own, None


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: SequenceContext, tail: Tensor, before: list[int]) -> Tensor:
        ctx.context, ctx.before, ctx.shape = context, before, tail.shape
        return send(context, tail, before)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].new_zeros(ctx.shape)
        add_to_last_(total, send_back(ctx.context, grads[0], ctx.before), None)
        return None, total, None


def last_tokens(x: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last tokens of each row [B,T,C] -> [B,count,C].

    Args:
        lengths: tokens of each row [B], before its padding; rows with fewer than `count` begin with zeros.
            None: T.
    """
    if lengths is None:
        return x[:, x.shape[1] - count :]
    places = _last_places(count, lengths)[..., None]
    found = x.gather(1, places.clamp_min(0).expand(-1, -1, x.shape[-1]))
    return found.masked_fill(places < 0, 0)


def add_to_last_(x: Tensor, added: Tensor, lengths: Tensor | None) -> None:
    """Add [B,count,...] to what `last_tokens` finds in x [B,T,...], in place; the adjoint of it."""
    if lengths is None:
        tail = x[:, x.shape[1] - added.shape[1] :]
        tail.copy_(tail.to(added.dtype) + added)
        return
    places = _last_places(added.shape[1], lengths)[..., None]
    added = added.masked_fill(places < 0, 0).to(x.dtype)
    x.scatter_add_(1, places.clamp_min(0).expand(-1, -1, x.shape[-1]), added)


def _last_places(count: int, lengths: Tensor) -> Tensor:
    return lengths[:, None] + torch.arange(-count, 0, device=lengths.device)


def send(context: SequenceContext, x: Tensor, before: list[int]) -> Tensor:
    """What this rank reads before its own tokens [B,before[rank],...], of the last tokens of all ranks' x."""
    sent, received = _shares(context, before)
    return torch.cat(_exchanged(context, [x[:, x.shape[1] - n :] for n in sent], received, x), 1)


def send_back(context: SequenceContext, grad: Tensor, before: list[int]) -> Tensor:
    """The adjoint of `send`: gradients of a rank's last tokens, summed over those that read them.

    Returns:
        [B,n,...] in float32 (float64 for float64 inputs), of the n tokens that some rank reads.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("A sequence split over ranks has no second derivative.")
    sent, received = _shares(context, before)
    found = _exchanged(context, grad.split(received, 1), sent, grad)
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(len(grad), max(sent), *grad.shape[2:], dtype=wide)
    for part in found:
        total[:, total.shape[1] - part.shape[1] :] += part
    return total


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
    each = len(like) * like.shape[2:].numel()
    found = context.exchange(flat, [p.numel() for p in sent], [n * each for n in received])
    parts = found.split([n * each for n in received])
    return [
        part.view(len(like), n, *like.shape[2:]) for part, n in zip(parts, received, strict=True)
    ]
