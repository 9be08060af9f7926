"""Common and frequent words: which words of a long list come up most often."""

from collections.abc import Callable
from random import Random

from gka.evaluation.context.prompt import Draft, Setting, as_many_as_fit
from gka.evaluation.context.vocabulary import invented_words

HEAD = "Count how often each word comes up.\n"
OFTEN, SELDOM, RATIO = 30, 3, 10


def common_words(setting: Setting) -> Draft:
    """Ten words that come up ten times as often as all others, 30 times against 3 where there is room.

    In short texts there are three of them, and the others come up once.
    """
    tail = "\nQuestion: which {} words come up most often?\nAnswer:"

    def counts(total: int) -> tuple[int, list[int]]:
        common = 10 if total >= 200 else 3
        often = max(4, min(OFTEN, total // (2 * common)))
        seldom = max(1, min(SELDOM, often // RATIO))
        others = max(common, (total - common * often) // seldom)
        return common, [often] * common + [seldom] * others

    return _counted(setting, tail, counts)


def frequent_words(setting: Setting) -> Draft:
    """The three most frequent of words whose frequency falls with the square of their rank."""
    tail = "\nQuestion: which {} words come up most often?\nAnswer:"

    def counts(total: int) -> tuple[int, list[int]]:
        found, left = [], total
        for rank in range(1, total + 1):
            count = max(1, round(0.6 * total / rank**2))
            if left < count:
                break
            found.append(count)
            left -= count
        return 3, found

    return _counted(setting, tail, counts)


def _counted(setting: Setting, tail: str, counts: Callable[[int], tuple[int, list[int]]]) -> Draft:
    """A draft of as many words as there is room for; `counts(total)` says how many are the answer, and
    how often each word comes up."""
    budget = setting.length - len(setting.pieces.start) - setting.tokens(HEAD, tail.format(10))
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
        HEAD,
        [(1.0, text(total))],
        tail.format(number),
        answers,
        tuple(shown),
        body=True,
        hidden=tuple(words[: len(found)]) if len(found) < 200 else (),
    )


def _mixed(words: list[str], counts: list[int], order: int) -> str:
    """All words as often as `counts` says, in random order, eight a line."""
    listed = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
    Random(order).shuffle(listed)
    rows = (listed[i : i + 8] for i in range(0, len(listed), 8))
    return "".join(" ".join(row) + "\n" for row in rows)
