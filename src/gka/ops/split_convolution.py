"""`convolve_heads` of rows that are split over ranks: convolutions read the tokens before each rank's own.

The last W - 1 inputs of a rank go to the next one, whose kernel takes them as the state before its tokens.
Only the first W - 1 outputs read that state, so the backward kernel, run on them alone behind its inputs, has
its gradient. Nothing of the rows' size is copied.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gka.ops.context import SequenceContext
from gka.ops.convolution import backward_op, check_parts, forward_op, past_tokens
from gka.ops.halo import add_to_last_, halos, last_tokens, send, send_back

Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


@torch.compiler.disable(reason="ranks exchange tokens: a graph cannot hold the collective")
def split_convolve_heads(
    context: SequenceContext,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    weights: tuple[Tensor, Tensor, Tensor | None],
    head_dim: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`convolve_heads` of this rank's tokens; every rank calls it, forward and backward.

    Args:
        context: holds the bounds of packed documents.
        inputs, weights, head_dim, lengths: as in `gka.ops.convolution.convolve_heads`.
    """
    check_parts(inputs, weights, (None, None, None), head_dim)
    given = [None if x is None else x.contiguous() for x in (*inputs, *weights)]
    yq, yk, yv = _SplitConvolutions.apply(context, *given, lengths, head_dim)
    return yq, yk, None if inputs[2] is None else yv


class _SplitConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: SequenceContext, q: Tensor, k: Tensor, v: Tensor | None, wq: Tensor,
        wk: Tensor, wv: Tensor | None, lengths: Tensor | None, head_dim: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        width, length = wq.shape[-1], q.shape[1]
        before = halos(context, width - 1)
        parts = [x for x in (q, k, v) if x is not None]
        count = min(width - 1, length)
        tail = torch.cat([last_tokens(x, count, lengths) for x in parts], -1)
        halo = send(context, tail, before)
        past = None
        bounds = context.bounds(halo.shape[1])[0]
        if bounds is not None:
            past = past_tokens(bounds, halo.shape[1] + length, width)[halo.shape[1] :]
        states = _states(halo, (q, k, v), width)
        ctx.save_for_backward(q, k, v, wq, wk, wv, *states, past, lengths, halo)
        ctx.context, ctx.before, ctx.head_dim = context, before, head_dim
        return forward_op(q, k, v, wq, wk, wv, *states, past, lengths, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *tensors, halo = ctx.saved_tensors
        needed, inputs, lengths = ctx.needs_input_grad, tensors[:3], tensors[-1]
        dy = [None if x is None else g.contiguous() for x, g in zip(inputs, grads, strict=True)]
        found = backward_op(*tensors, *dy, ctx.head_dim, True, any(needed[4:7]))
        back = send_back(ctx.context, _of_halo(halo, tensors, dy, ctx.head_dim), ctx.before)
        there = [n for n, x in enumerate(inputs) if x is not None]
        shares = back.split([inputs[n].shape[-1] for n in there], -1)
        for n, share in zip(there, shares, strict=True):
            add_to_last_(found[n], share, lengths)
        wanted = (dx if need else None for dx, need in zip(found, needed[1:7], strict=True))
        return None, *wanted, None, None


def _states(halo: Tensor, inputs: Parts, width: int) -> Parts:
    """The halo [B,n,C] as convolutions' states [B,C,W] of q, k and v; None where there is none."""
    if halo.shape[1] == 0:
        return None, None, None
    states = pad(halo.mT, (width - halo.shape[1], 0))
    parts = iter(states.split([x.shape[-1] for x in inputs if x is not None], 1))
    q, k, v = (None if x is None else next(parts).contiguous() for x in inputs)
    return q, k, v


def _of_halo(halo: Tensor, tensors: list[Any], dy: list[Tensor | None], head_dim: int) -> Tensor:
    """The halo's gradient [B,n,C]: the backward kernel on W - 1 tokens behind W - 1 earlier ones."""
    q, k, v, wq, wk, wv, *states, past, lengths = tensors
    if halo.shape[1] == 0:
        return torch.zeros_like(halo)
    back = wq.shape[-1] - 1
    first = [
        None if x is None else torch.cat([state[..., 1:].mT, x[:, :back]], 1).contiguous()
        for x, state in zip((q, k, v), states, strict=True)
    ]
    outputs = [None if g is None else pad(g[:, :back], (0, 0, back, 0)) for g in dy]
    past = None if past is None else pad(past[:back], (back, 0))
    lengths = None if lengths is None else lengths + back
    found = backward_op(
        *first, wq, wk, wv, None, None, None, past, lengths, *outputs, head_dim, True, False
    )
    parts = [dx for dx, x in zip(found, first, strict=False) if x is not None]
    return torch.cat([dx[:, back - halo.shape[1] : back] for dx in parts], -1)
