"""Scores of a prompt, and bits per byte by position."""

import math

import pytest
import torch

from gka.evaluation.context.haystack import Haystack
from gka.evaluation.context.reader import Reader
from gka.evaluation.context.scoring import (
    Grader,
    bits_per_byte,
    bucket_edges,
    chance,
    match_score,
    rank_score,
    window,
    window_bits,
)
from gka.evaluation.context.tasks import TASKS, draw_sample
from scripted import constant, oracle


def test_a_match_is_a_whole_word_in_any_case():
    """The share of answers that are in the text as whole words, in any case."""
    assert match_score("It is in the Attic, or so.", ("attic",)) == 1.0
    assert match_score("123, 45", ("123", "456")) == 0.5
    assert match_score("know nothing", ("no",)) == 0.0
    assert match_score("f(x) = _state.", ("_state",)) == 1.0
    assert match_score("", ("a",)) == 0.0


def test_ranks_count_the_best_as_many_as_there_are_answers():
    """Of the k candidates with the largest gains, k the number of answers, the share that are answers."""
    assert rank_score([3.0, 1.0, 2.0], [True, False, False]) == 1.0
    assert rank_score([1.0, 3.0, 2.0], [True, False, False]) == 0.0
    assert rank_score([4.0, 3.0, 2.0, 1.0], [True, False, True, False]) == 0.5


def test_ties_count_as_if_broken_at_random():
    """Equal gains share the places that are left."""
    assert rank_score([1.0] * 4, [True, False, False, False]) == 0.25
    assert rank_score([5.0, 1.0, 1.0, 1.0], [True, True, False, False]) == pytest.approx(2 / 3)
    assert rank_score([1.0, 5.0, 1.0, 1.0], [True, False, True, False]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_the_answers_gets_everything(task: str, haystack: Haystack):
    """A model that knows the answers scores 1 by both scores, with every tokenizer."""
    samples = [draw_sample(task, 700, 0.5, 0, index, haystack) for index in range(2)]
    grader = Grader(Reader(oracle(samples, haystack.pieces), 300), haystack.pieces)  # type: ignore[arg-type]
    for sample in samples:
        found = grader.grade(sample)
        assert (found["match"], found["rank"]) == (1.0, 1.0), found


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_nothing_gets_chance(task: str, haystack: Haystack):
    """A model that finds everything equally likely ranks as guessing does, and writes no answer."""
    sample = draw_sample(task, 700, 0.5, 0, 0, haystack)
    grader = Grader(Reader(constant(haystack.pieces), 300), haystack.pieces)  # type: ignore[arg-type]
    found = grader.grade(sample)
    assert found["rank"] == pytest.approx(chance(sample)) and found["chance"] == chance(sample)
    assert 0 < chance(sample) < 0.76 and found["match"] == 0.0


def test_what_is_likely_without_the_text_wins_nothing(byte_haystack: Haystack):
    """A model with a taste for one candidate, text or no text, ranks as guessing does."""
    sample = draw_sample("facts-1", 700, 0.0, 0, 0, byte_haystack)
    model = constant(byte_haystack.pieces)
    model.script = lambda read: {ord(sample.answers[0][0]): 9.0} if read[-1] == ord(" ") else {}
    grader = Grader(Reader(model, 300), byte_haystack.pieces)  # type: ignore[arg-type]
    assert grader.grade(sample)["rank"] == pytest.approx(chance(sample))


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
