"""Keep NaN and infinity causal: they affect only their own and later tokens of their sequence and head.

A chunk's products weight the tokens after t by exact zeros, and 0 x NaN is NaN. Tokens that are not
finite are therefore replaced by zeros before the products, and all that they affect is set to NaN
afterwards. Finite inputs are checked once and not copied.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

GATES = ("g", "gk", "beta", "alpha")


@dataclass(frozen=True)
class Reach:
    """Where non-finite tokens affect H_t, U_t and o_t, [B,T,H] each."""

    h: Tensor
    u: Tensor
    o: Tensor


def finite_rows(x: Tensor, heads: int | None = None) -> Tensor:
    """Whether each row of x [B,T,h,D] is finite, repeated to [B,T,heads] if heads share rows."""
    finite = x.abs().amax(-1).isfinite()  # amax propagates NaN
    return finite if heads is None else finite.repeat_interleave(heads // x.shape[2], 2)


def finite_decay(g: Tensor) -> Tensor:
    """Whether each log decay is valid: finite, or -inf, a decay of 0 (a hard reset)."""
    return g.isfinite() | (g == -torch.inf)


def onwards(bad: Tensor, cu_seqlens: Tensor | None, back: bool = False) -> Tensor:
    """True from the first true of each sequence on (back: up to its last), bool [B,T,H]."""
    length = bad.shape[1]
    count = bad.long().cumsum(1)
    before = torch.nn.functional.pad(count, (0, 0, 1, 0))  # [B,T+1,H]
    first, last = 0, length
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        places = torch.arange(length, device=bad.device)
        sequence = torch.searchsorted(bounds[1:].contiguous(), places, right=True)
        first, last = bounds[sequence], bounds[sequence + 1]
    if back:
        return (
            before[:, last] - before[:, :length] > 0
            if cu_seqlens is not None
            else (before[:, last:] - before[:, :length] > 0)
        )
    return count - (before[:, first] if cu_seqlens is not None else before[:, :1]) > 0


def ends(reached: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether the state after each sequence's last token is reached, bool [N,H]."""
    if cu_seqlens is None:
        return reached[:, -1] if reached.shape[1] else reached.any(1)
    bounds = cu_seqlens.long()
    last = reached[0, (bounds[1:] - 1).clamp_min(0)] if reached.shape[1] else reached[0, :0]
    if not reached.shape[1]:
        return last.new_zeros(len(bounds) - 1, reached.shape[2])
    return last & (bounds[1:] > bounds[:-1]).unsqueeze(-1)


def begins(reached: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether the state before each sequence's first token is reached backwards, bool [N,H]."""
    if cu_seqlens is None:
        return reached.any(1)
    bounds = cu_seqlens.long()
    if not reached.shape[1]:
        return reached.new_zeros(len(bounds) - 1, reached.shape[2])
    first = reached[0, bounds[:-1].clamp_max(reached.shape[1] - 1)]
    return first & (bounds[1:] > bounds[:-1]).unsqueeze(-1)


def take_out(tokens, tied: bool):
    """Replace non-finite tokens (gka.maths.chunked.Tokens) by zeros; returns the tokens and their reach.

    If all are finite, returns the given tokens and None.
    """
    heads = tokens.q.shape[2]
    fine_k = finite_rows(tokens.k, heads)
    if tokens.beta is not None:
        fine_k = fine_k & tokens.beta.isfinite()
    fine_v = finite_rows(tokens.v, heads)
    fine_g = None if tokens.g is None else finite_decay(tokens.g)
    gk = tokens.g if tied else tokens.gk
    fine_gk = None if gk is None else finite_decay(gk)
    fine_h = fine_k if fine_gk is None else fine_k & fine_gk
    fine_u = fine_k & fine_v if fine_g is None else fine_k & fine_v & fine_g
    # on other devices this test would wait for the device
    if tokens.k.device.type == "cpu" and bool((fine_h & fine_u).all()):
        return tokens, None
    h, u = (onwards(~fine, tokens.cu_seqlens) for fine in (fine_h, fine_u))
    clean = tokens._replace(
        k=tokens.k.nan_to_num(0.0, 0.0, 0.0),
        v=tokens.v.nan_to_num(0.0, 0.0, 0.0),
        beta=None if tokens.beta is None else tokens.beta.nan_to_num(0.0, 0.0, 0.0),
        g=None if tokens.g is None else tokens.g.where(finite_decay(tokens.g), 0.0),
        gk=None if tokens.gk is None else tokens.gk.where(finite_decay(tokens.gk), 0.0),
    )
    return clean, Reach(h, u, h | u)


def put_back(o: Tensor, h: Tensor | None, u: Tensor, reach: Reach | None, tokens, solve: bool):
    """Set o [B,T,H,V] and the final states [N,H,K,.] to NaN where `take_out`'s tokens reach them."""
    if reach is None:
        return o, h, u
    bounds = tokens.cu_seqlens
    o = o.masked_fill((reach.o if solve else reach.u).unsqueeze(-1), torch.nan)
    u = u.masked_fill(ends(reach.u, bounds)[..., None, None], torch.nan)
    if h is not None:
        h = h.masked_fill(ends(reach.h, bounds)[..., None, None], torch.nan)
    return o, h, u


def take_out_rows(tokens, x: Tensor | None, do: Tensor, reach: Reach | None):
    """Replace non-finite rows by zeros in what the derivative reads token by token.

    Returns (tokens, x, do, rows): rows bool [B,T,H] is true where q, alpha, x or do is not finite, or
    where the output was NaN and has a gradient; None if it is true nowhere.
    """
    fine = finite_rows(tokens.q) & finite_rows(do)
    for row in (x,):
        fine = fine if row is None else fine & finite_rows(row)
    if tokens.alpha is not None:
        fine = fine & tokens.alpha.isfinite()
    rows = ~fine
    if reach is not None:
        rows = rows | (reach.o & (do != 0).any(-1))
    if rows.device.type == "cpu" and not bool(rows.any()):
        return tokens, x, do, None
    drop = rows.unsqueeze(-1)
    clean = tokens._replace(
        q=tokens.q.masked_fill(drop, 0.0),
        alpha=None if tokens.alpha is None else tokens.alpha.masked_fill(rows, 0.0),
    )
    return clean, None if x is None else x.masked_fill(drop, 0.0), do.masked_fill(drop, 0.0), rows


def put_back_gradients(grads, rows: Tensor | None, tokens):
    """Set the gradients (gka.maths.adjoint.Gradients) of all inputs of those rows to NaN."""
    if rows is None:
        return grads
    heads = rows.shape[2]
    past = onwards(rows, tokens.cu_seqlens, back=True)

    def shared(x: Tensor) -> Tensor:
        groups = past.unflatten(2, (x.shape[2], heads // x.shape[2])).any(-1)
        return x.masked_fill(groups.unsqueeze(-1), torch.nan)

    def gate(x: Tensor | None, where: Tensor = past) -> Tensor | None:
        return None if x is None else x.masked_fill(where, torch.nan)

    def state(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.masked_fill(begins(past, tokens.cu_seqlens)[..., None, None], torch.nan)

    return replace(
        grads,
        q=grads.q.masked_fill(rows.unsqueeze(-1), torch.nan),
        k=shared(grads.k),
        v=shared(grads.v),
        g=gate(grads.g),
        gk=gate(grads.gk),
        alpha=gate(grads.alpha, rows),
        beta=gate(grads.beta),
        h0=state(grads.h0),
        u0=state(grads.u0),
    )
