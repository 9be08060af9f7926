"""Prompts of exactly so many tokens: a task's draft laid into local text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from gka.errors import InputError
from gka.evaluation.context.haystack import Haystack, Line, Pieces


@dataclass(frozen=True)
class Draft:
    """What a task wants to be read, before it is laid into other text.

    Attributes:
        head: lines that come first.
        inserts: (depth, lines): where among the other text, 0 its beginning and 1 its end.
        tail: the question, up to where the answer begins.
        answers: all that has to be in the answer.
        candidates: what the answers are told apart from when they are ranked, answers included.
        body: the inserts are the text, other text only fills what is left over, and depths mean nothing.
        hidden: further strings that the other text must not have in it.
    """

    head: str
    inserts: list[tuple[float, str]]
    tail: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    body: bool = False
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt and what is right.

    Attributes:
        ids: the prompt, of exactly the asked number of tokens.
        bare: head and question alone: what a candidate's likelihood without the text is measured on.
        answers, candidates: see `Draft`.
        depths: where the inserts came to stand, as parts of the other text before them; none where
            there is no other text to speak of.
        answer_tokens: tokens that all answers take.
    """

    ids: list[int] = field(repr=False)
    bare: list[int] = field(repr=False)
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    depths: tuple[float, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Setting:
    """What a task may draw from.

    Attributes:
        rng: the only source of randomness.
        length: tokens of the prompt.
        depth: where to put what is asked for, for tasks that put it in one place.
        pieces, haystack: tokens, and other text.
    """

    rng: Random
    length: int
    depth: float
    pieces: Pieces
    haystack: Haystack

    def tokens(self, *texts: str) -> int:
        """Tokens of the texts, each encoded by itself."""
        return sum(map(len, self.pieces.encode(texts)))


def fill(draft: Draft, setting: Setting) -> Sample:
    """Lay a draft into other text so that the whole has exactly `setting.length` tokens.

    Raises:
        InputError: the draft alone is longer; the message says how long it is.
    """
    pieces = setting.pieces
    head, tail, *inserts = pieces.encode(
        [draft.head, draft.tail, *(text for _, text in draft.inserts)]
    )
    head = pieces.start + head
    missing = setting.length - len(head) - len(tail) - sum(map(len, inserts))
    if missing < 0:
        raise InputError(
            f"length {setting.length} is too short: this takes {setting.length - missing} tokens"
        )
    hidden = {*draft.answers, *draft.candidates, *draft.hidden}
    lines = setting.haystack.take(missing, setting.rng, sorted(hidden))
    wanted = [depth for depth, _ in draft.inserts]
    middle, depths = _laid(lines, missing, list(zip(wanted, inserts, strict=True)))
    answer = " " + ", ".join(draft.answers)
    return Sample(
        ids=head + middle + tail,
        bare=head + tail,
        answers=draft.answers,
        candidates=draft.candidates,
        depths=() if draft.body else tuple(depths),
        answer_tokens=setting.tokens(answer),
    )


def _laid(
    lines: list[Line], total: int, inserts: list[tuple[float, list[int]]]
) -> tuple[list[int], list[float]]:
    """Ids of lines and inserts, each insert at the line end nearest to its depth, in their order."""
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line.ids))
    # Behind the last line, which may be cut short, only if the end is asked for.
    places = [
        len(lines)
        if depth >= 1
        else min(range(len(ends)), key=lambda i: abs(ends[i] - depth * total))
        for depth, _ in inserts
    ]
    at: dict[int, list[int]] = {}
    for place, (_, ids) in zip(places, inserts, strict=True):
        at.setdefault(place, []).extend(ids)
    found: list[int] = []
    for i in range(len(ends)):
        found += at.get(i, [])
        if i < len(lines):
            found += lines[i].ids
    return found, [ends[place] / total if total else 0.0 for place in places]


def as_many_as_fit(make: Callable[[int], str], budget: int, setting: Setting, least: int) -> int:
    """About the largest number n for which the text `make(n)` has no more than `budget` tokens.

    `least` where even that takes more: what is made then is refused by `fill`, with its length.
    """
    number = least
    size = setting.tokens(make(number))
    for _ in range(6):  # texts grow about in proportion, so each guess is close to the next
        if size > budget or number * budget // size <= number:
            break
        number = number * budget // size
        size = setting.tokens(make(number))
    while size > budget and number > least:
        number = max(least, min(number - 1, number * budget // size))
        size = setting.tokens(make(number))
    return number
