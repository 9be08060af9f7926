"""Reading of long prompts in chunks, with any causal language model that has a cache."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gka.errors import InputError
from gka.models.cache import CACHE_NAME

ROOM = 1 << 30  # largest size in bytes of a cache's copies at a time


@dataclass(frozen=True)
class State:
    """The state after reading a prompt.

    Attributes:
        cache: the model's cache.
        logits: logits of the next token, float32 [vocabulary].
    """

    cache: Any
    logits: Tensor


class Reader:
    """Reads prompts, scores continuations and decodes greedily.

    Args:
        model: a causal language model of transformers.
        chunk: tokens per forward pass; affects memory and speed, not the result.

    Raises:
        InputError: `chunk` is below 1.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = 2048) -> None:
        if chunk < 1:
            raise InputError(f"chunk is {chunk}; expected 1 or more")
        self.model, self.chunk = model, chunk
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> State:
        """The state after a prompt of one token or more."""
        cache, logits = None, torch.empty(0)
        for part in self._tensor([ids]).split(self.chunk, dim=1):
            logits, cache = self._forward(part, cache, last_only=True)
        return State(cache, logits[0, -1].float())

    def token_losses(self, ids: Sequence[int]) -> Tensor:
        """-log p of every token but the first, given the tokens before it, in nats: float32 [tokens - 1]."""
        return self.losses([(ids[:1], ids[1:])])[0][0]

    @torch.inference_mode()
    def losses(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[Tensor, Tensor]]:
        """-log p in nats of each token of continuations, and whether it is the likeliest; rows in one batch.

        Logits are formed from the shortest context's end on, for one chunk at a time.

        Args:
            rows: (context, continuation) pairs, each of one token or more.

        Returns:
            For each row float32 and bool [tokens of the continuation], on the CPU.
        """
        inputs, targets = self._rows(rows)
        begin = min(len(context) for context, _ in rows) - 1
        found: list[tuple[Tensor, Tensor]] = []
        cache = None
        for part in inputs[:, :begin].split(self.chunk, dim=1) if begin else ():
            _, cache = self._forward(part, cache, last_only=True)
        chunk = self._chunk_with_logits(len(rows))
        for part, wanted in zip(
            inputs[:, begin:].split(chunk, 1), targets[:, begin:].split(chunk, 1), strict=True
        ):
            logits, cache = self._forward(part, cache, last_only=False)
            logits = logits.float()
            losses = torch.nn.functional.cross_entropy(logits.mT, wanted, reduction="none")
            found.append((losses.cpu(), (logits.argmax(-1) == wanted).cpu()))
        losses, likeliest = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        spans = [(len(c) - 1 - begin, len(c) - 1 - begin + len(t)) for c, t in rows]
        return [(losses[i, a:b], likeliest[i, a:b]) for i, (a, b) in enumerate(spans)]

    def log_likelihoods(self, state: State, texts: Sequence[Sequence[int]]) -> list[float]:
        """log p in nats of each continuation of one token or more, after the prompt of `state`."""
        return [value for value, _ in self.scores(state, texts)]

    @torch.inference_mode()
    def scores(self, state: State, texts: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """log p in nats of each continuation after the prompt of `state`, and whether it is the greedy one.

        `state` does not change.
        """
        first, likeliest = state.logits.log_softmax(-1), int(state.logits.argmax())
        found = [(float(first[text[0]]), text[0] == likeliest) for text in texts]
        longer = [i for i, text in enumerate(texts) if len(text) > 1]
        at_once = max(1, ROOM // max(1, _bytes_of(state.cache))) if longer else 1
        for start in range(0, len(longer), at_once):
            group = longer[start : start + at_once]
            rest = self._rest_scores(state, [texts[i] for i in group])
            for i, (value, greedy) in zip(group, rest, strict=True):
                found[i] = (found[i][0] + value, found[i][1] and greedy)
        return found

    @torch.inference_mode()
    def write(self, state: State, most: int, end: Sequence[int]) -> list[int]:
        """Greedy decoding of at most `most` tokens, up to and without the first token in `end`.

        Consumes `state`: its cache is updated with the written tokens.
        """
        written: list[int] = []
        logits, cache = state.logits, state.cache
        while len(written) < most:
            token = int(logits.argmax())
            if token in end:
                break
            written.append(token)
            if len(written) < most:
                new, cache = self._forward(self._tensor([[token]]), cache, last_only=True)
                logits = new[0, -1].float()
        return written

    def _rest_scores(self, state: State, texts: list[Sequence[int]]) -> list[tuple[float, bool]]:
        """`scores` of the second and later tokens, in one batch after copies of the cache."""
        inputs, targets = self._rows([(text[:1], text[1:]) for text in texts])
        cache = copy.deepcopy(state.cache)
        cache.reorder_cache(torch.zeros(len(texts), dtype=torch.long, device=inputs.device))
        logits = self._forward(inputs, cache, last_only=False)[0].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        greedy = ((logits.argmax(-1) == targets) | (targets == -100)).all(1)
        return list(zip((-losses.double().sum(1)).tolist(), greedy.tolist(), strict=True))

    def _rows(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
        """Inputs of (context, continuation) pairs, and targets, -100 outside the continuations.

        Padding is on the right, where causality keeps it without influence.
        """
        width = max(len(context) + len(text) for context, text in rows) - 1
        inputs = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full_like(inputs, -100)
        for i, (context, text) in enumerate(rows):
            whole = torch.tensor([*context, *text])
            inputs[i, : len(whole) - 1] = whole[:-1]
            targets[i, len(context) - 1 : len(whole) - 1] = whole[len(context) :]
        return inputs.to(self.model.device), targets.to(self.model.device)

    def _chunk_with_logits(self, rows: int) -> int:
        """Tokens per forward pass with all logits: 256 MiB in float32, at least 64, at most `chunk`."""
        vocabulary = getattr(self.model.config, "vocab_size", None) or 1 << 16
        return min(self.chunk, max(64, (1 << 26) // (vocabulary * rows)))

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([list(ids) for ids in rows], device=self.model.device)

    def _forward(self, ids: Tensor, cache: Any, last_only: bool) -> tuple[Tensor, Any]:
        """Logits (of the last token, or of all) and cache after reading `ids` [B,T] after `cache`.

        Raises:
            InputError: the model returns no cache.
        """
        options = {"logits_to_keep": 1} if last_only and self._keeps else {}
        output = self.model(input_ids=ids, use_cache=True, **{CACHE_NAME: cache}, **options)
        cache = getattr(output, CACHE_NAME, None)
        if cache is None:
            raise InputError(
                f"model {type(self.model).__name__} keeps no cache that can be passed on"
                f" ({CACHE_NAME}), so it cannot read in chunks"
            )
        return output.logits, cache


def _bytes_of(cache: Any) -> int:
    """Bytes of the tensors in a cache's layers."""
    found = 0
    for layer in getattr(cache, "layers", ()):
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else (value,)
            found += sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
    return found
