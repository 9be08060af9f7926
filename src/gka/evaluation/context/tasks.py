"""The tasks by name."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from gka.errors import InputError
from gka.evaluation.context import cloze, counting, facts, needles, tracing
from gka.evaluation.context.haystack import Haystack
from gka.evaluation.context.prompt import Draft, Sample, Setting, fill

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        draw: makes a draft of a `Setting`.
        has_depth: what is asked for stands in one place, which the depth grid moves.
        about: one line for people.
    """

    draw: Callable[[Setting], Draft]
    has_depth: bool
    about: str


TASKS: dict[str, Task] = {
    "needle": Task(needles.needle, True, "one code in other text"),
    "needle-keys": Task(needles.needle_keys, True, "one of four codes by its name"),
    "needle-only": Task(needles.needle_only, True, "one code in a text of codes alone"),
    "needle-values": Task(needles.needle_values, False, "all four codes of a name"),
    "needle-queries": Task(needles.needle_queries, False, "the codes of four names of eight"),
    "variables": Task(tracing.variables, False, "all names a number was handed on to"),
    "common-words": Task(counting.common_words, False, "the words that come up ten times as often"),
    "frequent-words": Task(counting.frequent_words, False, "the three most frequent words"),
    "questions": Task(cloze.questions, True, "the last word of a line that was read"),
    "facts-1": Task(facts.one_fact, False, "where a person is"),
    "facts-2": Task(facts.two_facts, False, "where a thing is that somebody took along"),
    "facts-3": Task(facts.three_facts, False, "where a thing was before"),
    "facts-4": Task(facts.counted_facts, False, "how many things a person has"),
    "facts-5": Task(facts.checked_facts, False, "whether a person is in a place"),
}
NAMES = (*TASKS, PERPLEXITY)


def draw_sample(
    task: str, length: int, depth: float, seed: int, index: int, haystack: Haystack
) -> Sample:
    """Sample `index` of a cell: the same on every machine for the same text, tokenizer and numbers.

    Raises:
        InputError: the length is too short for the task; the message says what it takes.
    """
    rng = Random(f"{task} {length} {depth:.6f} {seed} {index}")
    setting = Setting(rng, length, depth, haystack.pieces, haystack)
    try:
        return fill(TASKS[task].draw(setting), setting)
    except InputError as error:
        raise InputError(f"task {task}: {error}") from None
