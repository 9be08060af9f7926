"""What answers are worth."""

import pytest

from gka.evaluation.context.haystack import Haystack
from gka.evaluation.context.reader import Reader
from gka.evaluation.context.scoring import Grader, chance, match_score, rank_score
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
