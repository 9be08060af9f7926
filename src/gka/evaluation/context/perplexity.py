"""Bits per byte of local text by position: whether what was read long ago still helps.

A model that uses its context says later tokens with fewer bits. Windows of exactly `length` tokens are
read from their beginning; bits and bytes are summed in buckets of positions, [1, 64), [64, 128), and
then doubling, so that bits per byte is comparable between tokenizers.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

from gka.evaluation.context.haystack import Haystack, Line
from gka.evaluation.context.reader import Reader


def bucket_edges(length: int) -> list[int]:
    """Positions at which buckets begin, and the end: 1, 64, 128, 256 ... `length`."""
    edges = [1]
    edge = 64
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def window(length: int, seed: int, index: int, haystack: Haystack) -> list[Line]:
    """Lines of exactly `length` tokens together, with those that the tokenizer puts before a text.

    The same for every model with the same tokenizer.
    """
    text = length - len(haystack.pieces.start)
    return haystack.take(text, Random(f"perplexity {length} {seed} {index}"))


def measure(lines: Sequence[Line], reader: Reader, start: Sequence[int]) -> dict[str, list[float]]:
    """Bits and bytes of a window in each bucket; the first token is not predicted and not counted.

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


def summarize(samples: Sequence[dict[str, list[float]]], length: int) -> dict[str, Any]:
    """Bits per byte over all windows, and bucket by bucket."""
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
    """Bytes of each token: a line's bytes, in equal parts.

    A token of a byte-level vocabulary may be half a character, so nothing finer adds up.
    """
    return [len(line.text.encode()) / len(line.ids) for line in lines for _ in line.ids]
