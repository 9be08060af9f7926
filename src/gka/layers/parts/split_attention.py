"""Causal softmax attention of one rank's queries, in a sequence that is split over ranks.

Keys and values of earlier ranks come first. Each packed document is one call of torch's attention, and a
window is computed by blocks of queries, so that no mask has the size of queries times keys. Padding alone
needs such a mask.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from gka.layers.parts.masks import visible
from gka.ops.context import SequenceContext
from gka.ops.halo import with_halo

BLOCK = 1024
"""Least queries of a block of a window."""


def attend_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, context: SequenceContext, window: int | None
) -> Tensor:
    """Attention of this rank's queries to its own and earlier ranks' keys.

    Args:
        q: [B,H,T,D], rotated by places in whole rows or documents, as k.
        k, v: [B,Hk,T,D] of this rank's tokens.
        context: the ranks, all of which make the call.
        window: positions that a query sees, its own included; None for all.

    Returns:
        [B,H,T,D].
    """
    both = torch.cat([k, v], 1).transpose(1, 2)
    both = with_halo(context, both, None if window is None else window - 1).transpose(1, 2)
    k, v = both.chunk(2, 1)
    halo = k.shape[2] - q.shape[2]
    if context.attention_mask is not None:
        first = context.begin - halo
        mask = visible(
            halo, q.shape[2], k.shape[2], cu_seqlens=None, window=window, device=q.device,
            attention_mask=context.attention_mask[:, first : context.end],
        )  # fmt: skip
        return _attention(q, k, v, mask)
    bounds = context.bounds(halo)[1]
    ends = [0, k.shape[2]] if bounds is None else bounds.tolist()
    found = []
    for a, b in itertools.pairwise(ends):
        own = q[:, :, max(a - halo, 0) : b - halo]
        found.append(_causal(own, k[:, :, a:b], v[:, :, a:b], window))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last tokens of a document, [B,H,T,D], to all of its keys [B,Hk,S,D], T <= S."""
    queries, keys = q.shape[2], k.shape[2]
    if window is None or keys <= window:
        if queries == keys:
            return _attention(q, k, v, None, causal=True)
        return _attention(q, k, v, causal_lower_right(queries, keys))
    before, block = keys - queries, max(window, BLOCK)
    found = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        first = max(before + start - window + 1, 0)
        last = before + end
        mask = visible(
            before + start - first, end - start, last - first, attention_mask=None, cu_seqlens=None,
            window=window, device=q.device,
        )  # fmt: skip
        part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        # None: one query that sees all, or as many queries as keys
        causal = mask is None and end - start > 1
        found.append(_attention(*part, mask, causal=causal))
    return torch.cat(found, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: object, causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )  # pyright: ignore
