"""Two scores of a sample, each from 0 to 1, and bits per byte.

match: share of the answers that are whole words, in any case, of the line that the model writes greedily.
    RULER also counts parts of words. The model must be able to answer a question.
rank: candidates are ranked by the gain in likelihood from the long text,
        log p(candidate | whole prompt) - log p(candidate | prompt without the text);
    the score is the share of answers among the k best, k the number of answers. It needs no writing, so it
    also tells small models apart. Guessing gives `chance`; ties count as if broken at random.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from gka.evaluation.context.haystack import Haystack, Line, Pieces, Sample
from gka.evaluation.context.reader import Reader


def match_score(written: str, answers: Sequence[str]) -> float:
    """Share of `answers` that occur in `written`, in any case, not inside a longer word."""
    found = (rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in answers)
    return sum(bool(re.search(f, written, re.IGNORECASE)) for f in found) / len(answers)


def rank_score(gains: Sequence[float], right: Sequence[bool]) -> float:
    """Expected share of answers among the k candidates with the largest gains, k the number of answers.

    Args:
        gains: each candidate's gain.
        right: whether each candidate is an answer.
    """
    wanted = sum(right)
    limit = sorted(gains, reverse=True)[wanted - 1]
    above = [r for gain, r in zip(gains, right, strict=True) if gain > limit]
    level = [r for gain, r in zip(gains, right, strict=True) if gain == limit]
    expected = sum(above) + (wanted - len(above)) * sum(level) / len(level)
    return expected / wanted


def chance(sample: Sample) -> float:
    """Mean `rank_score` of guessing among the candidates."""
    return len(sample.answers) / len(sample.candidates)


@dataclass
class Grader:
    """Asks a model and scores its answer.

    Attributes:
        reader: the model.
        pieces: encoder with the model's tokenizer.
        end: ids that end an answer: EOS, and the line end if it is one token.
    """

    reader: Reader
    pieces: Pieces

    def __post_init__(self) -> None:
        end = self.pieces.tokenizer.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.end = {int(i) for i in ends if i is not None}
        if len(self.pieces.newline) == 1:
            self.end.add(self.pieces.newline[0])

    def grade(self, sample: Sample) -> dict[str, Any]:
        """Both scores of a sample and the line that the model wrote, JSON-ready."""
        texts = self.pieces.encode([f" {candidate}" for candidate in sample.candidates])
        state = self.reader.read(sample.ids)
        with_text = self.reader.log_likelihoods(state, texts)
        without = self.reader.log_likelihoods(self.reader.read(sample.bare), texts)
        gains = [a - b for a, b in zip(with_text, without, strict=True)]
        right = [candidate in sample.answers for candidate in sample.candidates]
        written = self._written(state, 2 * sample.answer_tokens + 16)
        return {
            "match": match_score(written, sample.answers),
            "rank": rank_score(gains, right),
            "chance": chance(sample),
            "answers": list(sample.answers),
            "written": written,
        }

    def _written(self, state: Any, most: int) -> str:
        ids = self.reader.write(state, most, tuple(self.end))
        return self.pieces.decode(ids).split("\n")[0]


def bucket_edges(length: int) -> list[int]:
    """First positions of the buckets, then the end: 1, 64, 128, 256, ..., `length`."""
    edges = [1]
    edge = 64
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def window(length: int, seed: int, index: int, haystack: Haystack) -> list[Line]:
    """Lines with exactly `length` tokens in total, including those that the tokenizer puts before a text.

    Models with the same tokenizer have the same window.
    """
    text = length - len(haystack.pieces.start)
    return haystack.take(text, Random(f"perplexity {length} {seed} {index}"))


def window_bits(
    lines: Sequence[Line], reader: Reader, start: Sequence[int]
) -> dict[str, list[float]]:
    """Bits and bytes of a window in each bucket; the first token is not predicted, hence not counted.

    Args:
        lines: the window.
        reader: the model.
        start: ids that its tokenizer puts before every text.
    """
    ids = [*start, *(i for line in lines for i in line.ids)]
    losses = reader.token_losses(ids).double() / math.log(2)
    sizes = ([0.0] * len(start) + _token_bytes(lines))[1:]
    edges = bucket_edges(len(ids))
    spans = [(a - 1, b - 1) for a, b in pairwise(edges)]
    return {
        "bits": [float(losses[a:b].sum()) for a, b in spans],
        "bytes": [math.fsum(sizes[a:b]) for a, b in spans],
    }


def bits_per_byte(samples: Sequence[dict[str, list[float]]], length: int) -> dict[str, Any]:
    """Bits per byte of all windows, and in each bucket."""
    bits, sizes = (
        [math.fsum(column) for column in zip(*(s[name] for s in samples), strict=True)]
        for name in ("bits", "bytes")
    )
    return {
        "bits_per_byte": math.fsum(bits) / math.fsum(sizes),
        "edges": bucket_edges(length),
        "bits_per_byte_by_position": [a / b for a, b in zip(bits, sizes, strict=True)],
    }


def _token_bytes(lines: Sequence[Line]) -> list[float]:
    """Bytes of each token: equal shares of its line's bytes.

    A byte-level token may be part of a character, so its own text does not give its bytes.
    """
    return [len(line.text.encode()) / len(line.ids) for line in lines for _ in line.ids]
