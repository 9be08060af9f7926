"""Token ids and masks that a session is given, checked before anything is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gka.errors import InputError
from gka.models import GKAForCausalLM

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


def token_ids(tokens: Ids, model: GKAForCausalLM, rows: int | None) -> Tensor:
    """`tokens` as int64 [B,T] on the model's device; `rows`: what B must be, None: any.

    Raises:
        InputError: a shape, dtype or id that does not fit.
    """
    try:
        ids = torch.as_tensor(tokens, device=model.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"tokens: expected token ids, got {tokens!r:.60} ({error})") from None
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(
            f"tokens: expected whole numbers [batch, tokens], at least one; got {ids.dtype} of shape "
            f"{tuple(ids.shape)}"
        )
    if rows not in (None, ids.shape[0]):
        raise InputError(
            f"tokens: the session has {rows} rows, got {ids.shape[0]}: give one text a "
            "row, or open another session"
        )
    vocabulary = model.config.vocab_size
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise InputError(f"tokens: ids must be in 0..{vocabulary - 1}, got {low}..{high}")
    return ids.long()


def left_padding(attention_mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """The mask of ids [B,T] as booleans beside them; None where there is no padding.

    Raises:
        InputError: another shape or dtype, or padding that is not on the left.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != ids.shape or attention_mask.is_floating_point():
        raise InputError(
            f"attention_mask: expected 0 and 1 of the tokens' shape {tuple(ids.shape)}, got "
            f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.to(ids.device).bool()
    if not bool(mask[:, -1].all()):
        raise InputError(
            "attention_mask: the last column must be tokens, since the next ones follow it: pad on "
            "the left"
        )
    return None if bool(mask.all()) else mask
