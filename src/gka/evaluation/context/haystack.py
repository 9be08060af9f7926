"""Local text as lines of tokens, and prompts of an exact number of tokens: a draft laid into that text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from gka.data.text import Document, corpus_fingerprint, read_pieces
from gka.errors import InputError

LONGEST_LINE = 400  # characters; a longer line is read as several lines


class Line(NamedTuple):
    """A line of text, its line end included, and its token ids."""

    text: str
    ids: list[int]


class Pieces:
    """Encodes texts piece by piece, so that prompts can be measured and assembled in tokens.

    Attributes:
        start: ids that the tokenizer puts before every text: its BOS token or none.
        newline: ids of a line end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._before = self._plain(["\n"])[0]
        bos = tokenizer.bos_token_id
        begins = list(tokenizer("a")["input_ids"])[:1]  # type: ignore[call-overload]
        self.start: list[int] = [bos] if bos is not None and begins == [bos] else []  # type: ignore[list-item]
        self.newline = self.encode(["\n"])[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as if it followed a line end.

        Otherwise tokenizers that put a space before every text would put one before each piece.
        """
        if not texts:
            return []
        before = self._before
        behind = self._plain([f"\n{text}" for text in texts])
        merged = [i for i, ids in enumerate(behind) if ids[: len(before)] != before]
        alone = self._plain([texts[i] for i in merged]) if merged else []
        found = [ids[len(before) :] for ids in behind]
        for i, ids in zip(merged, alone, strict=True):
            found[i] = ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _plain(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]  # type: ignore[union-attr]


class Haystack:
    """Documents as their lines that are not blank, read and tokenized on demand.

    Args:
        documents: those of `gka.data.find_documents`.
        pieces: encodes lines.
    """

    def __init__(self, documents: Sequence[Document], pieces: Pieces) -> None:
        self.documents, self.pieces = documents, pieces
        self.fingerprint = corpus_fingerprint(documents)
        self.lines = lru_cache(maxsize=256)(self._lines)

    def take(self, tokens: int, rng: Random, without: Sequence[str] = ()) -> list[Line]:
        """Lines with exactly `tokens` tokens in total, from a random place in randomly ordered documents.

        Lines that contain a string of `without` (in any case) are left out, and the last line is cut. A text
        of fewer tokens is read repeatedly.

        Raises:
            InputError: no document has a usable line.
        """
        forbidden = re.compile("|".join(map(re.escape, without)) or r"(?!)", re.IGNORECASE)
        order = rng.sample(range(len(self.documents)), len(self.documents))
        skipped, taken, missing = rng.random(), [], tokens
        while missing:
            before = missing
            for i in order:
                lines = self.lines(i)
                for line in lines[int(skipped * len(lines)) :]:
                    if forbidden.search(line.text):
                        continue
                    taken.append(self._cut(line, missing))
                    missing -= len(taken[-1].ids)
                    if not missing:
                        return taken
                skipped = 0.0
            if missing == before:
                raise InputError("text: no usable line; give files with more text")
        return taken

    def _cut(self, line: Line, tokens: int) -> Line:
        """The line, or its beginning and line end with `tokens` tokens in total."""
        if len(line.ids) <= tokens:
            return line
        end = self.pieces.newline
        kept = line.ids[: tokens - len(end)] + end if tokens > len(end) else line.ids[:tokens]
        return Line(self.pieces.decode(kept), kept)

    def _lines(self, index: int) -> list[Line]:
        texts = [
            line
            for piece in read_pieces(self.documents[index].path)
            for line in _split_lines(piece)
        ]
        return [Line(t, ids) for t, ids in zip(texts, self.pieces.encode(texts), strict=True)]


def _split_lines(text: str) -> list[str]:
    lines = []
    for line in text.split("\n"):
        line = line.rstrip()
        while len(line) > LONGEST_LINE:
            cut = line.rfind(" ", 1, LONGEST_LINE)
            cut = LONGEST_LINE if cut < 0 else cut
            lines.append(line[:cut] + "\n")
            line = line[cut:].lstrip()
        if line:
            lines.append(line + "\n")
    return lines


@dataclass(frozen=True)
class Draft:
    """The parts of a task's prompt, before they are laid into other text.

    Attributes:
        head: first lines of the prompt.
        inserts: (depth, lines); depth is the place in the other text, from 0 (beginning) to 1 (end).
        tail: the question, up to the beginning of the answer.
        answers: strings that the answer must contain.
        candidates: strings that are ranked, answers included.
        body: the inserts are the whole text: other text only fills up the length, and depths do not count.
        hidden: further strings that must not occur in the other text.
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
    """A prompt and its answers.

    Attributes:
        ids: the prompt, with exactly the requested number of tokens.
        bare: head and question alone, for a candidate's likelihood without the text.
        answers, candidates: see `Draft`.
        depths: share of the other text that stands before each insert; empty with `Draft.body`.
        answer_tokens: tokens of all answers in total.
    """

    ids: list[int] = field(repr=False)
    bare: list[int] = field(repr=False)
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    depths: tuple[float, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Setting:
    """The inputs of a task.

    Attributes:
        rng: the only source of randomness.
        length: tokens of the prompt.
        depth: place of the line that is asked for, in tasks with `has_depth`.
        pieces, haystack: encoder of texts, and other text.
    """

    rng: Random
    length: int
    depth: float
    pieces: Pieces
    haystack: Haystack

    def tokens(self, *texts: str) -> int:
        """Number of tokens of the texts, each encoded separately."""
        return sum(map(len, self.pieces.encode(texts)))


def fill(draft: Draft, setting: Setting) -> Sample:
    """Lay a draft into other text, with exactly `setting.length` tokens in total.

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
    """Ids of lines and inserts, each insert at the line end nearest to its depth; and the actual depths."""
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line.ids))
    # The nearest line end may be the end of the text, where the last line may be cut short.
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

    `least` if even `make(least)` has more: `fill` then refuses the draft and states its length.
    """
    number = least
    size = setting.tokens(make(number))
    for _ in range(6):  # lengths are about proportional to n, so guesses converge fast
        if size > budget or number * budget // size <= number:
            break
        number = number * budget // size
        size = setting.tokens(make(number))
    while size > budget and number > least:
        number = max(least, min(number - 1, number * budget // size))
        size = setting.tokens(make(number))
    return number
