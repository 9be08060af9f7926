"""Causal models that know everything or nothing, for tests of what evaluation makes of them."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from gka.evaluation.context.haystack import Pieces, Sample
from gka.models.cache import CACHE_NAME


class TokenCache:
    """A cache that keeps the tokens themselves, row by row."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def reorder_cache(self, index: torch.Tensor) -> None:
        self.rows = [list(self.rows[int(i)]) for i in index]


class Scripted:
    """A causal model whose next token follows a script: text read so far -> {next id: log weight}."""

    def __init__(self, vocabulary: int, script: Any) -> None:
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.device = torch.device("cpu")
        self.script = script
        self.calls: list[int] = []

    def forward(self, input_ids: Any, use_cache: bool, logits_to_keep: int = 0) -> None: ...

    def __call__(
        self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0, **named: Any
    ) -> Any:
        assert use_cache
        self.calls.append(input_ids.shape[1])
        past = named.pop(CACHE_NAME)
        assert not named
        rows = [list(row) for row in past.rows] if past else [[] for _ in input_ids]
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for i, ids in enumerate(input_ids.tolist()):
            for t, token in enumerate(ids):
                rows[i].append(token)
                if t >= len(ids) - logits_to_keep or not logits_to_keep:
                    for index, weight in self.script(rows[i]).items():
                        logits[i, t, index] = weight
        if past:
            past.rows = rows
        cache = past or TokenCache(rows)
        return SimpleNamespace(
            logits=logits[:, -logits_to_keep:] if logits_to_keep else logits, **{CACHE_NAME: cache}
        )


def oracle(samples: Sequence[Sample], pieces: Pieces) -> Scripted:
    """Knows the answers of these prompts: says any of them, and writes all of them."""
    known: dict[tuple[int, ...], list[tuple[list[int], float]]] = {}
    for sample in samples:
        listed = [f" {answer}" for answer in sample.answers] + [" " + ", ".join(sample.answers)]
        texts = [ids + pieces.newline for ids in pieces.encode(listed)]
        known[tuple(sample.ids)] = [(ids, 20.0) for ids in texts[:-1]] + [(texts[-1], 21.0)]

    def script(read: list[int]) -> dict[int, float]:
        found: dict[int, float] = {}
        for prompt, texts in known.items():
            if tuple(read[: len(prompt)]) != prompt:
                continue
            said = read[len(prompt) :]
            for ids, weight in texts:
                if ids[: len(said)] == said and len(said) < len(ids):
                    found[ids[len(said)]] = max(weight, found.get(ids[len(said)], 0.0))
        return found

    return Scripted(1 + max(pieces.tokenizer.get_vocab().values()), script)


def constant(pieces: Pieces) -> Scripted:
    """Finds every token equally likely."""
    return Scripted(1 + max(pieces.tokenizer.get_vocab().values()), lambda read: {})
