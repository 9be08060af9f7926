"""Bits per byte by position."""

import math

import pytest
import torch

from gka.evaluation.context.haystack import Haystack
from gka.evaluation.context.reader import Reader
from gka.evaluation.context.scoring import bits_per_byte, bucket_edges, window, window_bits
from scripted import constant


def test_buckets_double_and_cover_every_predicted_token():
    """Buckets begin at 1, 64, 128 and doubling, and end with the text."""
    assert bucket_edges(256) == [1, 64, 128, 256]
    assert bucket_edges(300) == [1, 64, 128, 256, 300]
    assert bucket_edges(50) == [1, 50]


def test_windows_have_the_asked_tokens_and_follow_from_the_seed(haystack: Haystack):
    """A window has exactly `length` tokens, the same for the same seed and index, else another."""
    first = window(700, 0, 1, haystack)
    assert sum(len(line.ids) for line in first) == 700 - len(haystack.pieces.start)
    assert first == window(700, 0, 1, haystack)
    assert first != window(700, 0, 2, haystack) and first != window(700, 1, 1, haystack)


def test_equally_likely_bytes_take_all_their_bits(byte_haystack: Haystack):
    """A model of 257 equally likely tokens, each a byte, needs log2(257) bits a byte in every bucket."""
    reader = Reader(constant(byte_haystack.pieces), 100)  # type: ignore[arg-type]
    found = [window_bits(window(300, 0, i, byte_haystack), reader, ()) for i in range(2)]
    assert found[0]["bytes"] == pytest.approx([63, 64, 128, 44])
    result = bits_per_byte(found, 300)
    assert result["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5)
    assert result["bits_per_byte_by_position"] == pytest.approx([math.log2(257)] * 4, rel=1e-5)


def test_bits_are_of_the_tokens_and_bytes_of_their_text(haystack: Haystack):
    """Whatever the tokenizer: bits are log2 of the vocabulary a token, bytes those of the text: of all of it
    behind a token that begins every text, else without the first token's."""
    reader = Reader(constant(haystack.pieces), 100)  # type: ignore[arg-type]
    lines = window(600, 0, 0, haystack)
    start = haystack.pieces.start
    found = window_bits(lines, reader, start)
    vocabulary = 1 + max(haystack.pieces.tokenizer.get_vocab().values())
    assert sum(found["bits"]) == pytest.approx(599 * math.log2(vocabulary), rel=1e-5)
    exact = len("".join(line.text for line in lines).encode())
    first = 0 if start else len(lines[0].text.encode()) / len(lines[0].ids)
    assert sum(found["bytes"]) == pytest.approx(exact - first)


def test_a_text_that_becomes_predictable_takes_fewer_bits_later(byte_haystack: Haystack):
    """Bits are counted in the bucket of the token that they are for."""
    model = constant(byte_haystack.pieces)
    lines = window(256, 0, 0, byte_haystack)
    ids = [i for line in lines for i in line.ids]
    model.script = lambda read: {ids[len(read)]: 40.0} if 128 <= len(read) < 256 else {}
    found = window_bits(lines, Reader(model, 50), ())  # type: ignore[arg-type]
    bits = bits_per_byte([found], 256)["bits_per_byte_by_position"]
    assert bits[:2] == pytest.approx([math.log2(257)] * 2, rel=1e-5) and bits[2] < 1e-3
    assert torch.isfinite(torch.tensor(bits)).all()
