"""Attention masks of 0 and 1: how padding is kept from tokens, and which keys each query sees."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gka.errors import InputError
from gka.ops import checks
from gka.ops.context import SequenceContext, check_context


def check_inputs(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Check the arguments that all mixers share.

    Returns:
        The mask: bool if it was floating point, else unchanged.

    Raises:
        ValueError: a shape or dtype that does not fit, or a mask together with cu_seqlens.
    """
    checks.check_tensor("hidden_states", hidden_states)
    for name, x in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
        if x is not None:
            checks.check_tensor(name, x)
    if hidden_states.dim() != 3 or hidden_states.shape[1] == 0:
        raise ValueError(
            "hidden_states must be [batch, tokens, hidden_size] with at least one token, got shape "
            f"{tuple(hidden_states.shape)}"
        )
    batch, length = hidden_states.shape[:2]
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "attention_mask and cu_seqlens exclude each other: packed sequences have no padding"
            )
        if attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask must be [batch, tokens] of 0 (padding) and 1 (token), "
                f"got shape {tuple(attention_mask.shape)}"
            )
        if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must cover the batch of {batch} and at least the {length} tokens "
                f"of hidden_states, got shape {tuple(attention_mask.shape)}"
            )
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens needs the sequences packed into batch 1, got batch {batch}")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(hidden_states, cu_seqlens)
    if attention_mask is not None and attention_mask.is_floating_point():
        return token_mask(attention_mask)
    return attention_mask


def own_mask(
    context: SequenceContext,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: object,
    use_cache: bool,
) -> Tensor | None:
    """The mask of this rank's tokens of rows that are split over ranks; checks the call.

    Raises:
        InputError: a mask, bounds or a cache come with the context, or other tokens than this rank's.
    """
    if attention_mask is not None:
        raise InputError(
            "attention_mask: the context holds the mask of whole rows: give it to ContextParallel, and leave "
            "it out of the call."
        )
    if cache is not None or use_cache:
        raise InputError(
            "a sequence that is split over ranks has no cache: leave out past_key_values and use_cache, or "
            "context."
        )
    checks.check_tensor("hidden_states", hidden_states)
    check_context(context, hidden_states.shape[1] if hidden_states.dim() > 1 else 0, cu_seqlens)
    mask = context.attention_mask
    return None if mask is None else mask[:, context.begin : context.end]


def check_width(hidden_states: Tensor, hidden_size: int) -> None:
    """Check that hidden states have the mixer's width and a floating-point dtype.

    Raises:
        ValueError: another width.
        TypeError: another dtype.
    """
    if hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden_states must be hidden_size = {hidden_size} wide, got {hidden_states.shape[-1]}"
        )
    if hidden_states.dtype not in checks.DTYPES:
        raise TypeError(f"hidden_states must be floating-point, got {hidden_states.dtype}")


def token_mask(attention_mask: Tensor) -> Tensor:
    """The mask of tokens: a mask of 0 and 1, unchanged unless floating point, which becomes bool.

    peft's prompts come with floating-point masks. Additive masks (0 and -inf) are floating point, too, but
    mean the opposite at 0: they are refused, in a compiled graph by an assertion when it runs.

    Args:
        attention_mask: [B,T] of 0 (padding) and 1 (token) in any dtype.

    Raises:
        ValueError: it holds other numbers.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    is_token = attention_mask == 1
    known = (is_token | (attention_mask == 0)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(known, _OTHER_NUMBERS)
    elif not known:
        raise ValueError(_OTHER_NUMBERS)
    return is_token if attention_mask.is_floating_point() else attention_mask


_OTHER_NUMBERS = (
    "attention_mask must hold 0 (padding) and 1 (token) only; masks to be added to scores, and masks that "
    "number documents, are not taken"
)


@dataclass(frozen=True)
class Padding:
    """Each row's tokens moved, in order, before its padding.

    Padding after the tokens cannot affect them through any causal map, convolutions included; a zero key and
    a zero log decay keep it out of the states, too. Left padding, right padding and padding between two
    cached calls therefore give exactly the results of the rows alone, at the cost of two gathers.

    Attributes:
        is_token: where the caller's tokens are, bool [B,T].
        order: for each place, its position in the caller's order [B,T].
        lengths: tokens of each row [B].
        is_padding: places after a row's tokens, bool [B,T].
    """

    is_token: Tensor
    order: Tensor
    lengths: Tensor
    is_padding: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor | None, length: int) -> "Padding | None":
        """The padding of the mask's last `length` columns: a longer mask covers the cached past, too."""
        if attention_mask is None:
            return None
        is_token = attention_mask[:, -length:].bool()
        order = torch.argsort((~is_token).int(), dim=1, stable=True)
        lengths = is_token.sum(1)
        places = torch.arange(length, device=order.device)
        return cls(is_token, order, lengths, places >= lengths[:, None])

    def align(self, x: Tensor) -> Tensor:
        """[B,T,D]: tokens first, zeros behind."""
        x = _take(x, self.order)
        return x.masked_fill(self.is_padding[..., None], 0)

    def clear(self, x: Tensor) -> Tensor:
        """Aligned [B,T,...] with zeros at the padding."""
        shape = (*self.is_padding.shape, *(1 for _ in x.shape[2:]))
        return x.masked_fill(self.is_padding.view(shape), 0)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `align`: [B,T,D] in the caller's order, zeros at the padding."""
        x = _take(x, torch.argsort(self.order, dim=1))
        return x.masked_fill(~self.is_token[..., None], 0)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Row b's tokens order[b] of x [B,T,D]. Not take_along_dim, which binds a compiled graph to B and T."""
    return x.gather(1, order[..., None].expand_as(x))


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
    """Check that an attention's mask covers the cached past, too, which may hold padding.

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
    """The mask of a call, bool [B or 1, 1, T, keys]; None for plain causal attention.

    None means one query that sees all keys, or as many queries as keys, each seeing the keys up to its own.

    Args:
        past: positions before the call.
        length: T, the call's positions.
        keys: number of keys: of the last positions (a cache may have dropped earlier ones), or of the first
            (a static cache has places for later positions).
        attention_mask: [B, past + T], 1 for tokens.
        cu_seqlens: bounds of packed sequences.
        window: positions that a query sees, its own included; None for all.
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
        # a softmax over no keys is NaN: padding sees itself, and no token sees it
        mask = (mask & is_token[:, None]) | (column == row)
    return mask[:, None]


def _for_every_length(condition: bool) -> bool:
    """Whether a condition holds for all lengths that a graph under compilation may get.

    Deciding it for the current length alone would bind the graph to lengths with the same answer.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _sequence(places: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the packed sequence that each place belongs to."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places.contiguous(), right=True)
