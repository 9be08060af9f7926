"""Local text as lines of tokens, and prompts of exactly so many tokens: a task's draft laid into it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from gka.data.text import Document, corpus_fingerprint, read_pieces
from gka.errors import InputError

LONGEST_LINE = 400  # characters; what is longer is read as several lines


class Line(NamedTuple):
    """A line of text with its line end, and its token ids."""

    text: str
    ids: list[int]


class Pieces:
    """Texts to ids, piece by piece, so that prompts can be counted and put together in tokens.

    Attributes:
        start: ids that the tokenizer puts before every text.
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
        """Ids of each text as it would be read behind a line end.

        Tokenizers that put a space before every text would otherwise do so before each piece.
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
    """Documents as lines without blank ones, read and tokenized when they are needed.

    Args:
        documents: of `gka.data.find_documents`.
        pieces: turns lines into ids.
    """

    def __init__(self, documents: Sequence[Document], pieces: Pieces) -> None:
        self.documents, self.pieces = documents, pieces
        self.fingerprint = corpus_fingerprint(documents)
        self.lines = lru_cache(maxsize=256)(self._lines)

    def take(self, tokens: int, rng: Random, without: Sequence[str] = ()) -> list[Line]:
        """Lines of exactly `tokens` tokens together, from a random place of the text on.

        Lines with a string of `without` in them (in any case) are left out; the last line is cut;
        what is shorter than `tokens` is read again from its beginning.

        Raises:
            InputError: no document has a line that can be used.
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
                raise InputError("text: no line that could be read; give files with text in them")
        return taken

    def _cut(self, line: Line, tokens: int) -> Line:
        """The line, or so much of its beginning that it has `tokens` tokens with its line end."""
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
