"""Questions about local text itself: how a line goes on that was read somewhere in it."""

import re
from collections.abc import Sequence
from random import Random

from gka.errors import InputError
from gka.evaluation.context.haystack import Haystack
from gka.evaluation.context.prompt import Draft, Setting

HEAD = "Read this text closely.\n"
TAIL = '\nQuestion: a line begins "{}". Which word ends it?\nAnswer:'
CANDIDATES, TRIES = 10, 2000
_END = re.compile(r"^\s*(.{20,120}\w.*?)[ .(]+(\w*[A-Za-z]\w{3,24})\W{0,3}\n$")


def questions(setting: Setting) -> Draft:
    """A line of the text, at the asked depth among text from elsewhere; asked for is its last word.

    The word is nowhere else in the prompt, so it can only be known from the line. The other candidates
    are last words of other lines.
    """
    ours = re.findall(r"\w{4,}", HEAD + TAIL)
    start, word, line = _line(setting.haystack, setting.rng, ours)
    words = [word]
    while len(words) < CANDIDATES:
        words.append(_line(setting.haystack, setting.rng, ours + words)[1])
    candidates = tuple(w for w in words if w == word or w.lower() not in line.lower())
    return Draft(
        head=HEAD,
        inserts=[(setting.depth, line)],
        tail=TAIL.format(start),
        answers=(word,),
        candidates=candidates,
    )


def _line(haystack: Haystack, rng: Random, taken: Sequence[str]) -> tuple[str, str, str]:
    """Beginning, last word and whole of a random line whose last word is new and not in its beginning.

    Raises:
        InputError: the text has no such lines.
    """
    lower = [word.lower() for word in taken]
    for _ in range(TRIES):
        lines = haystack.lines(rng.randrange(len(haystack.documents)))
        if not lines:
            continue
        match = _END.match(line := lines[rng.randrange(len(lines))].text)
        if match and match[2].lower() not in match[1].lower():
            word = match[2].lower()
            if not any(word in other or other in word for other in lower):
                return match[1], match[2], line
    raise InputError(
        "text: too few lines of 25 characters and more that end with different words, which the"
        " task questions asks for; give more text or leave the task out"
    )
