"""A prompt of any length through the model in pieces, so that memory is bounded by the piece."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.models import GKACache, GKAConfig, GKAForCausalLM
from gka.models.cache import CACHE_NAME

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
