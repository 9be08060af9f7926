"""Reading a prompt in pieces, which limits memory; checks of the input; and the choice of the next token."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gka.errors import InputError
from gka.models import GKACache, GKAConfig, GKAForCausalLM
from gka.models.cache import CACHE_NAME

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]
PREFILL_CHUNK = 4096
"""Default number of tokens of each row that go through the model at a time."""


@torch.no_grad()
def prefill(
    model: GKAForCausalLM,
    tokens: Tensor,
    cache: GKACache,
    *,
    attention_mask: Tensor | None = None,
    chunk: int = PREFILL_CHUNK,
) -> Tensor:
    """Read `tokens` into `cache`, in pieces of `chunk`, which does not change the result.

    Memory holds the activations of one piece and the logits of the last position. An attention layer also
    keeps keys and values of all tokens, and for several pieces a mask of [chunk, tokens so far] bytes.

    Args:
        model: the model; parameters get no gradient.
        tokens: ids [B,T], T >= 1.
        cache: the past, updated in place; a new `GKACache(model.config)` at the beginning.
        attention_mask: [B, past + T] of 0 and 1, or its last T columns if no layer is attention, as in
            `GKAModel.forward`. None: no padding.
        chunk: tokens of each row at a time.

    Returns:
        The logits after the last position [B,vocab_size], in the model's dtype.

    Raises:
        InputError: there are no tokens, or `chunk` is not positive.
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
    """`tokens` as int64 [B,T] on the model's device; B must be `rows` unless that is None.

    Raises:
        InputError: a shape, dtype or id does not fit.
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
    """The mask of ids as bool [B,T] on their device; None without padding.

    Raises:
        InputError: shape or dtype do not fit, or the last column has padding.
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
    """Admits one thread into a session at a time; a second one gets an error and does not wait."""

    def __init__(self):
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # a copy of a session is not in use
        return OneAtATime, ()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Use the session in the `with` block.

        Raises:
            InputError: another thread uses it.
        """
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "the session is in use by another thread: give each thread a session of its own (fork())"
            )
        try:
            yield
        finally:
            self._lock.release()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; a value out of range raises `InputError`.

    Attributes:
        max_new_tokens: at most this many tokens are added.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: sample from this many most likely tokens; 0 means all.
        top_p: sample from the most likely tokens that together have this probability.
        seed: seed of the random numbers; None uses torch's global generator.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if 0 < self.temperature < 1e-30:  # divided logits would overflow float32
            raise InputError(
                f"temperature is {self.temperature}; expected 0 (greedy), or 1e-30 or more"
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; expected a number from 0 to {2**64 - 1}")


def chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from logits [B,vocab_size] to next tokens int64 [B]; it holds the generator's state."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    process = _processors(sampling)
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> Tensor:
        # These processors use only the logits, not the previous tokens.
        nothing = torch.empty(logits.shape[0], 0, dtype=torch.long, device=logits.device)
        probabilities = process(nothing, logits.float()).softmax(-1)
        try:
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        except RuntimeError as error:  # CPUs check the probabilities
            raise InputError(
                "the next token's logits are not finite: the weights or the session's states are damaged "
                f"({str(error).splitlines()[0]})"
            ) from None

    return draw


def _processors(sampling: Sampling) -> Any:
    """transformers' processors, in the order of its `generate`."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors
