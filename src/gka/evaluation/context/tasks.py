"""The tasks by name: needles, variables, words to count, ends of lines, and facts of small worlds."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from gka.errors import InputError
from gka.evaluation.context import facts
from gka.evaluation.context.haystack import Draft, Haystack, Sample, Setting, as_many_as_fit, fill

ADJECTIVES = str.split(
    "amber ancient bitter blunt bold brisk calm clever coarse copper crisp curved dusty eager faint"
    " fierce flat fluffy frozen gentle glossy golden grim hollow humble icy ivory keen lazy lively"
    " lonely loud marble mellow misty narrow neat noble odd pale patient plain proud quaint quick"
    " quiet rapid rough rusty sharp shiny silent silver sleepy slim smoky solid steep stern sturdy"
    " subtle sunny sweet tidy timid tiny vivid warm wild wooden"
)
NOUNS = str.split(
    "anchor badger barrel basket beacon beetle bridge candle canyon castle cedar comet condor coral"
    " cradle crater dagger desert dolphin donkey drum falcon feather fiddle forest fossil fountain"
    " galaxy garden glacier goblet hammer harbor harvest hazel heron island jacket jaguar kettle"
    " kitten ladder lagoon lantern lemon lizard magnet maple meadow mirror monsoon needle oyster"
    " paddle parrot pebble pepper pigeon pillow planet pocket puppet quarry rabbit raven ribbon"
    " saddle salmon shadow spider spruce stable tunnel turtle valley velvet violin walnut whistle"
)
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def numbers(rng: Random, count: int, digits: int = 7) -> list[str]:
    """`count` distinct numbers of `digits` digits."""
    first = 10 ** (digits - 1)
    return [str(number) for number in rng.sample(range(first, 10 * first), count)]


def names_of_things(rng: Random, count: int) -> list[str]:
    """`count` distinct names such as "rusty falcon"; of three words if two give too few names."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    if count <= pairs // 4:
        chosen = rng.sample(range(pairs), count)
        return [f"{ADJECTIVES[i % len(ADJECTIVES)]} {NOUNS[i // len(ADJECTIVES)]}" for i in chosen]
    chosen = rng.sample(range(pairs * len(ADJECTIVES)), count)
    return [
        f"{ADJECTIVES[i // pairs]} {ADJECTIVES[i % len(ADJECTIVES)]} "
        f"{NOUNS[i % pairs // len(ADJECTIVES)]}"
        for i in chosen
    ]


def invented_words(rng: Random, count: int) -> list[str]:
    """`count` distinct words of six letters, consonants and vowels in turn, without meaning."""
    number = len(_SYLLABLES)
    return [
        "".join(_SYLLABLES[code // number**place % number] for place in range(3))
        for code in rng.sample(range(number**3), count)
    ]


def variable_names(rng: Random, count: int) -> list[str]:
    """`count` distinct variable names of five capital letters."""
    return [
        "".join(ascii_uppercase[code // 26**place % 26] for place in range(5))
        for code in rng.sample(range(26**5), count)
    ]


CODES_HEAD = "Remember the codes in this text.\n"
KEYS, VALUES, QUERIES, NUM_CANDIDATES = 4, 4, 4, 10


def needle(setting: Setting) -> Draft:
    """One code at `setting.depth`; the other candidates do not occur in the text."""
    (name,) = names_of_things(setting.rng, 1)
    codes = numbers(setting.rng, NUM_CANDIDATES)
    inserts = [(setting.depth, written(name, codes[0]))]
    return Draft(CODES_HEAD, inserts, asked(name), (codes[0],), tuple(codes))


def needle_keys(setting: Setting) -> Draft:
    """Four names with a code each; the one asked for is at `setting.depth`. Candidates: all four codes."""
    names = names_of_things(setting.rng, KEYS)
    codes = numbers(setting.rng, KEYS)
    others = [
        (setting.rng.random(), written(n, c)) for n, c in zip(names[1:], codes[1:], strict=True)
    ]
    inserts = [(setting.depth, written(names[0], codes[0])), *others]
    return Draft(CODES_HEAD, inserts, asked(names[0]), (codes[0],), tuple(codes))


def needle_only(setting: Setting) -> Draft:
    """A text of codes only; one at `setting.depth` is asked for. Candidates: it and up to nine others."""
    budget = (
        setting.length - len(setting.pieces.start) - setting.tokens(CODES_HEAD, asked("x" * 24))
    )
    pool = max(8, budget // 4)  # enough lines: each takes at least 4 tokens
    names, codes = names_of_things(setting.rng, pool), numbers(setting.rng, pool)

    def lines(count: int) -> str:
        pairs = zip(names[:count], codes[:count], strict=True)
        return "".join(written(*pair) for pair in pairs)

    count = min(pool, as_many_as_fit(lambda n: lines(min(n, pool)), budget, setting, least=4))
    chosen = min(count - 1, int(setting.depth * count))
    others = setting.rng.sample([c for c in codes[:count] if c != codes[chosen]], min(9, count - 1))
    return Draft(
        CODES_HEAD,
        [(1.0, lines(count))],
        asked(names[chosen]),
        (codes[chosen],),
        (codes[chosen], *others),
        body=True,
    )


def needle_values(setting: Setting) -> Draft:
    """One name with four codes in four places, all asked for. Candidates: these and another name's four."""
    names = names_of_things(setting.rng, 2)
    codes = numbers(setting.rng, 2 * VALUES)
    owners = [names[i // VALUES] for i in range(2 * VALUES)]
    inserts = [(setting.rng.random(), written(*pair)) for pair in zip(owners, codes, strict=True)]
    tail = f"\nQuestion: which codes has the {names[0]}?\nAnswer: the {names[0]} has code"
    return Draft(CODES_HEAD, inserts, tail, tuple(codes[:VALUES]), tuple(codes))


def needle_queries(setting: Setting) -> Draft:
    """Eight names with a code each; one question asks for four of the codes."""
    names = names_of_things(setting.rng, 2 * QUERIES)
    codes = numbers(setting.rng, 2 * QUERIES)
    inserts = [(setting.rng.random(), written(*pair)) for pair in zip(names, codes, strict=True)]
    wanted = ", ".join(f"the {name}" for name in names[:QUERIES])
    tail = f"\nQuestion: which codes have {wanted}?\nAnswer: in this order they have code"
    return Draft(CODES_HEAD, inserts, tail, tuple(codes[:QUERIES]), tuple(codes))


def written(name: str, code: str) -> str:
    """The line that states a code."""
    return f"The {name} has code {code}.\n"


def asked(name: str) -> str:
    """The question for a code, up to the beginning of the code."""
    return f"\nQuestion: which code has the {name}?\nAnswer: the {name} has code"


HOPS = 4


def variables(setting: Setting) -> Draft:
    """A chain of five names along which a number is passed, and a second chain with another number.

    All names of the first chain are asked for; those of the second are the other candidates.
    """
    rng = setting.rng
    names = variable_names(rng, 2 * (HOPS + 1))
    values = numbers(rng, 2, digits=5)
    inserts = []
    for chain, value in zip((names[: HOPS + 1], names[HOPS + 1 :]), values, strict=True):
        lines = [f"Set {chain[0]} to {value}.\n"]
        lines += [f"Set {b} to {a}.\n" for a, b in pairwise(chain)]
        places = sorted(rng.random() for _ in lines)  # names in the order of the chain
        inserts += zip(places, lines, strict=True)
    return Draft(
        head="Remember what each name is set to.\n",
        inserts=inserts,
        tail=f"\nQuestion: which {HOPS + 1} names are {values[0]} in the end?\nAnswer:",
        answers=tuple(names[: HOPS + 1]),
        candidates=tuple(names),
        hidden=tuple(values),
    )


COUNT_HEAD = "Count how often each word comes up.\n"
COUNT_TAIL = "\nQuestion: which {} words come up most often?\nAnswer:"
OFTEN, SELDOM, RATIO = 30, 3, 10


def common_words(setting: Setting) -> Draft:
    """Common words against rare ones: ten words 30 times each, the others 3 times each.

    Shorter texts have fewer repetitions, at least 4 against 1, and below 200 words three common words.
    """

    def counts(total: int) -> tuple[int, list[int]]:
        common = 10 if total >= 200 else 3
        often = max(4, min(OFTEN, total // (2 * common)))
        seldom = max(1, min(SELDOM, often // RATIO))
        others = max(common, (total - common * often) // seldom)
        return common, [often] * common + [seldom] * others

    return _counted(setting, counts)


def frequent_words(setting: Setting) -> Draft:
    """The three most frequent words, where frequency falls with the square of the rank."""

    def counts(total: int) -> tuple[int, list[int]]:
        found, left = [], total
        for rank in range(1, total + 1):
            count = max(1, round(0.6 * total / rank**2))
            if left < count:
                break
            found.append(count)
            left -= count
        return 3, found

    return _counted(setting, counts)


def _counted(setting: Setting, counts: Callable[[int], tuple[int, list[int]]]) -> Draft:
    """A draft with as many words as fit; `counts(total)`: number of answers, and repetitions of each word."""
    around = setting.tokens(COUNT_HEAD, COUNT_TAIL.format(10))
    budget = setting.length - len(setting.pieces.start) - around
    words = invented_words(setting.rng, max(40, min(budget, 250_000)))
    order = setting.rng.getrandbits(32)

    def text(total: int) -> str:
        return _mixed(words, counts(total)[1], order)

    total = as_many_as_fit(text, budget, setting, least=24)
    number, found = counts(total)
    answers = tuple(words[:number])
    others = tuple(words[number : min(len(found), 4 * number)])
    shown = setting.rng.sample(answers + others, len(answers + others))
    return Draft(
        COUNT_HEAD,
        [(1.0, text(total))],
        COUNT_TAIL.format(number),
        answers,
        tuple(shown),
        body=True,
        hidden=tuple(words[: len(found)]) if len(found) < 200 else (),
    )


def _mixed(words: list[str], counts: list[int], order: int) -> str:
    """Each word as often as `counts` says, in random order, eight words per line."""
    listed = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
    Random(order).shuffle(listed)
    rows = (listed[i : i + 8] for i in range(0, len(listed), 8))
    return "".join(" ".join(row) + "\n" for row in rows)


LINES_HEAD = "Read this text closely.\n"
LINES_TAIL = '\nQuestion: a line begins "{}". Which word ends it?\nAnswer:'
LINE_TRIES = 2000
_END = re.compile(r"^\s*(.{20,120}\w.*?)[ .(]+(\w*[A-Za-z]\w{3,24})\W{0,3}\n$")


def questions(setting: Setting) -> Draft:
    """The last word of a line of the text, which is laid into other text at `setting.depth`.

    The word occurs nowhere else in the prompt. The other candidates are last words of other lines.
    """
    ours = re.findall(r"\w{4,}", LINES_HEAD + LINES_TAIL)
    start, word, line = _line(setting.haystack, setting.rng, ours)
    words = [word]
    while len(words) < NUM_CANDIDATES:
        words.append(_line(setting.haystack, setting.rng, ours + words)[1])
    candidates = tuple(w for w in words if w == word or w.lower() not in line.lower())
    return Draft(
        head=LINES_HEAD,
        inserts=[(setting.depth, line)],
        tail=LINES_TAIL.format(start),
        answers=(word,),
        candidates=candidates,
    )


def _line(haystack: Haystack, rng: Random, taken: Sequence[str]) -> tuple[str, str, str]:
    """Beginning, last word and whole of a random line whose last word is not in its beginning.

    The last word neither contains nor is part of a word in `taken`.

    Raises:
        InputError: the text has no such lines.
    """
    lower = [word.lower() for word in taken]
    for _ in range(LINE_TRIES):
        lines = haystack.lines(rng.randrange(len(haystack.documents)))
        if not lines:
            continue
        match = _END.match(line := lines[rng.randrange(len(lines))].text)
        if match and match[2].lower() not in match[1].lower():
            word = match[2].lower()
            if not any(word in other or other in word for other in lower):
                return match[1], match[2], line
    raise InputError(
        "text: too few lines of 26 or more characters that end with different words, which the task"
        " questions needs; give more text or leave the task out"
    )


PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        draw: makes a draft from a `Setting`.
        has_depth: the line that is asked for has one place, given by `Setting.depth`.
        about: description in one line.
    """

    draw: Callable[[Setting], Draft]
    has_depth: bool
    about: str


TASKS: dict[str, Task] = {
    "needle": Task(needle, True, "one code in other text"),
    "needle-keys": Task(needle_keys, True, "one of four codes by its name"),
    "needle-only": Task(needle_only, True, "one code in a text of codes alone"),
    "needle-values": Task(needle_values, False, "all four codes of a name"),
    "needle-queries": Task(needle_queries, False, "the codes of four names of eight"),
    "variables": Task(variables, False, "all names a number was passed to"),
    "common-words": Task(common_words, False, "the common words among rare ones"),
    "frequent-words": Task(frequent_words, False, "the three most frequent words"),
    "questions": Task(questions, True, "the last word of a line that was read"),
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
    """Sample `index` of a cell: the same on every machine for equal text, tokenizer and arguments.

    Raises:
        InputError: the length is too short for the task; the message says how many tokens it takes.
    """
    rng = Random(f"{task} {length} {depth:.6f} {seed} {index}")
    setting = Setting(rng, length, depth, haystack.pieces, haystack)
    try:
        return fill(TASKS[task].draw(setting), setting)
    except InputError as error:
        raise InputError(f"task {task}: {error}") from None
