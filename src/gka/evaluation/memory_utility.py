"""What a model's long memory is worth, token by token: the loss after forgetting against that with the past.

    utility_n(x_t) = log p(x_t | x_1 .. x_{t-1}) - log p(x_t | the last n tokens, and those since)

in nats: the loss after a reset n tokens back minus the loss with the carried state, positive where the older
past helps. After Gdwm (arXiv 2601.12906), which takes the absolute value. Tokens are read in spans: the
first one of a span has exactly n tokens before it, the last one the span's length more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gka.errors import InputError
from gka.evaluation.context.reader import Reader

RESETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
AT_ONCE = 1 << 16  # tokens in a batch of spans


@dataclass(frozen=True)
class MemoryUtility:
    """Losses in nats of the same tokens of several texts.

    Attributes:
        resets: numbers n of tokens that are left before a span.
        carried: loss with the whole past, float32 [texts, tokens].
        after_reset: loss after each reset, float32 [resets, texts, tokens].
    """

    resets: tuple[int, ...]
    carried: Tensor
    after_reset: Tensor

    @property
    def utility(self) -> Tensor:
        """utility_n of every token, float32 [resets, texts, tokens]."""
        return self.after_reset - self.carried


def memory_utility(
    reader: Reader,
    texts: Sequence[Sequence[int]],
    start: int,
    stop: int,
    resets: Sequence[int] = RESETS,
    span: int | None = None,
) -> MemoryUtility:
    """The utility of the memory at tokens `start` to `stop - 1` of each text.

    Args:
        reader: the model.
        texts: ids, each text of `stop` tokens or more.
        start: first token, 1 or more. Where a reset lies before a text's beginning nothing is forgotten.
        stop: the token behind the last.
        resets: values of n, each 1 or more.
        span: tokens that share a reset; None: a quarter of n, at least 1.

    Raises:
        InputError: a text is too short, or a number is out of range.
    """
    _check(texts, start, stop, resets, span)
    carried = _losses(reader, texts, start, stop, start, stop - start)
    after = [_losses(reader, texts, start, stop, n, span or max(1, n // 4)) for n in resets]
    return MemoryUtility(tuple(resets), carried, torch.stack(after))


def _check(
    texts: Sequence[Sequence[int]], start: int, stop: int, resets: Sequence[int], span: int | None
) -> None:
    if not texts or min(map(len, texts)) < stop:
        shortest = min(map(len, texts), default=0)
        raise InputError(
            f"texts: the shortest has {shortest} tokens; expected stop = {stop} or more"
        )
    if not 1 <= start < stop:
        raise InputError(f"start is {start} and stop {stop}; expected 1 <= start < stop")
    if not resets or min(resets) < 1 or (span is not None and span < 1):
        raise InputError(f"resets are {tuple(resets)}, span {span}; expected numbers of 1 or more")


def _losses(
    reader: Reader, texts: Sequence[Sequence[int]], start: int, stop: int, n: int, span: int
) -> Tensor:
    """Losses of tokens `start` to `stop - 1` of each text, read in spans from n tokens before each."""
    rows = [
        (list(ids[max(0, at - n) : at]), list(ids[at : min(at + span, stop)]))
        for ids in texts
        for at in range(start, stop, span)
    ]
    found = [losses for group in _groups(rows, n + span) for losses, _ in reader.losses(group)]
    return torch.cat(found).unflatten(0, (len(texts), stop - start))


def _groups(rows: list, tokens: int) -> Iterator[list]:
    """Batches of rows of about so many tokens each."""
    size = max(1, AT_ONCE // tokens)
    for at in range(0, len(rows), size):
        yield rows[at : at + size]
