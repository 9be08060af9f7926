"""A prompt of any length through the model in pieces, so that memory is bounded by the piece; what is given
is checked before anything is read."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.models import GKACache, GKAConfig, GKAForCausalLM
from gka.models.cache import CACHE_NAME

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]
PREFILL_CHUNK = 4096
"""Tokens of each row that go through the model at a time unless told otherwise."""


@torch.no_grad()
def prefill(
    model: GKAForCausalLM,
    tokens: Tensor,
    cache: GKACache,
    *,
    attention_mask: Tensor | None = None,
    chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """Read `tokens` into `cache`, in pieces of `chunk`; the result does not depend on the pieces.

    Activations are held for one piece, and logits for the last position alone. An attention layer still
    keeps keys and values of all tokens, and with more than one piece it forms a mask of
    [chunk, tokens so far] bytes.

    Args:
        model: the model; parameters get no gradient.
        tokens: [B,T], T >= 1.
        cache: what came before; a new `GKACache(model.config)` if nothing did. Updated in place.
        attention_mask: [B, past + T] of 0 and 1 (the last T columns, if no layer is attention), as in
            `GKAModel.forward`. None: no padding.
        chunk: tokens of each row at a time.

    Returns:
        The logits after the last position [B,vocab_size], in the model's dtype.

    Raises:
        InputError: no tokens, or `chunk` is not positive.
    """
    check_chunk(chunk)
    length = tokens.shape[1]
    if length == 0:
        raise InputError("tokens: expected at least one token to read, got none")
    before = 0 if attention_mask is None else attention_mask.shape[1] - length
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        output = model(
            input_ids=tokens[:, begin:end],
            attention_mask=None if attention_mask is None else attention_mask[:, : before + end],
            use_cache=True,
            logits_to_keep=1,
            return_logits=end == length,
            return_dict=True,
            **{CACHE_NAME: cache},
        )
    return output.logits[:, -1]  # pyright: ignore[reportPossiblyUnboundVariable]


def check_model(model: Any) -> None:
    """Raise `InputError` unless `model` is a GKA language model."""
    if not isinstance(getattr(model, "config", None), GKAConfig) or not hasattr(model, "lm_head"):
        raise InputError(f"model: expected a GKAForCausalLM, got {type(model).__name__}")


def check_chunk(chunk: int) -> None:
    """Raise `InputError` unless `chunk` is a positive whole number."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(
            f"prefill_chunk is {chunk!r}; expected a whole number of tokens, 1 or more"
        )


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


class OneAtATime:
    """Lets one user into a session at a time; a second one is refused, not made to wait."""

    def __init__(self):
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # a copied session is in use by nobody
        return OneAtATime, ()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Hold the session in the `with` block.

        Raises:
            InputError: somebody else does.
        """
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "the session is in use by another thread: give each thread a session of its own (fork())"
            )
        try:
            yield
        finally:
            self._lock.release()
