"""Local text as lines of tokens: what facts are hidden in, and what perplexity is measured on."""

import re
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from gka.data.corpus import Document, corpus_fingerprint, read_pieces
from gka.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
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
