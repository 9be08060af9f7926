"""Which keys each query sees, and where tokens stand, for the attention mixers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def positions_of(
    length: int,
    past: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Positions of a call's tokens [B,T] or [1,T]: counted over tokens, within their own sequence."""
    places = torch.arange(past, past + length, device=device)
    if cu_seqlens is not None:
        return (places - cu_seqlens[_sequence(places, cu_seqlens)])[None]
    if attention_mask is None:
        return places[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def check_mask_length(attention_mask: Tensor | None, past: int, length: int) -> None:
    """An attention's mask covers the cached past too, since padding may be there.

    Raises:
        ValueError: it does not.
    """
    if attention_mask is not None and attention_mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask must cover the {past} cached and the {length} new positions, "
            f"{past + length} in all; got {attention_mask.shape[1]}"
        )


def visible(
    past: int,
    length: int,
    keys: int,
    *,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """The mask of a call, bool [B or 1, 1, T, keys]; None where plain causal attention is meant.

    None says: one query that sees all keys, or as many queries as keys, each seeing those up to it.

    Args:
        past: positions before the call.
        length: T, the call's positions.
        keys: keys at hand: the last of all positions (a cache may have dropped the first), or the
            first (a static cache has places for positions to come).
        attention_mask: [B, past + T], 1 for tokens.
        cu_seqlens: bounds of packed sequences.
        window: positions that a query sees, its own among them; None for all.
        device: of the mask.
    """
    short = window is None or _for_every_length(keys <= window)
    if attention_mask is None and cu_seqlens is None and short:
        one_sees_all = length == 1 and keys <= past + 1
        if one_sees_all or keys == length:
            return None
    first = max(past + length - keys, 0)
    row = torch.arange(past, past + length, device=device)[:, None]
    column = torch.arange(first, first + keys, device=device)
    mask = column <= row
    if window is not None:
        mask = mask & (row - column < window)
    if cu_seqlens is not None:
        mask = mask & (_sequence(row, cu_seqlens) == _sequence(column, cu_seqlens))
    mask = mask[None]
    if attention_mask is not None:
        to_come = max(keys - attention_mask.shape[1], 0)
        is_token = F.pad(attention_mask.bool(), (0, to_come))[:, first : first + keys]
        # a softmax over nothing is NaN: what stands at padding sees itself, and is seen by no token
        mask = (mask & is_token[:, None]) | (column == row)
    return mask[:, None]


def _for_every_length(condition: bool) -> bool:
    """Whether a condition holds for all lengths that a graph under compilation may meet.

    Deciding it for the length at hand alone would bind the graph to lengths that decide alike.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _sequence(places: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the packed sequence that each place belongs to."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places.contiguous(), right=True)
