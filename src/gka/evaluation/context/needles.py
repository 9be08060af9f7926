"""Needles: numbers written down somewhere in a long text, and asked for at its end."""

from gka.evaluation.context.prompt import Draft, Setting, as_many_as_fit
from gka.evaluation.context.vocabulary import names_of_things, numbers

HEAD = "Remember the codes in this text.\n"
KEYS, VALUES, QUERIES, CANDIDATES = 4, 4, 4, 10


def needle(setting: Setting) -> Draft:
    """One code at the asked depth; the candidates besides it are nowhere in the text."""
    (name,) = names_of_things(setting.rng, 1)
    codes = numbers(setting.rng, CANDIDATES)
    return Draft(
        HEAD, [(setting.depth, written(name, codes[0]))], asked(name), (codes[0],), tuple(codes)
    )


def needle_keys(setting: Setting) -> Draft:
    """Four names with a code each, one asked for, at the asked depth; the others are the candidates."""
    names = names_of_things(setting.rng, KEYS)
    codes = numbers(setting.rng, KEYS)
    others = [
        (setting.rng.random(), written(n, c)) for n, c in zip(names[1:], codes[1:], strict=True)
    ]
    inserts = [(setting.depth, written(names[0], codes[0])), *others]
    return Draft(HEAD, inserts, asked(names[0]), (codes[0],), tuple(codes))


def needle_only(setting: Setting) -> Draft:
    """A text of nothing but codes, one asked for at the asked depth; nine others are candidates."""
    budget = setting.length - len(setting.pieces.start) - setting.tokens(HEAD, asked("x" * 24))
    pool = max(8, budget // 4)  # no line has fewer tokens than its seven digits give
    names, codes = names_of_things(setting.rng, pool), numbers(setting.rng, pool)

    def lines(count: int) -> str:
        pairs = zip(names[:count], codes[:count], strict=True)
        return "".join(written(*pair) for pair in pairs)

    count = min(pool, as_many_as_fit(lambda n: lines(min(n, pool)), budget, setting, least=4))
    chosen = min(count - 1, int(setting.depth * count))
    others = setting.rng.sample([c for c in codes[:count] if c != codes[chosen]], min(9, count - 1))
    return Draft(
        HEAD,
        [(1.0, lines(count))],
        asked(names[chosen]),
        (codes[chosen],),
        (codes[chosen], *others),
        body=True,
    )


def needle_values(setting: Setting) -> Draft:
    """One name with four codes in four places, all asked for; another name's four are candidates too."""
    names = names_of_things(setting.rng, 2)
    codes = numbers(setting.rng, 2 * VALUES)
    owners = [names[i // VALUES] for i in range(2 * VALUES)]
    inserts = [(setting.rng.random(), written(*pair)) for pair in zip(owners, codes, strict=True)]
    tail = f"\nQuestion: which codes has the {names[0]}?\nAnswer: the {names[0]} has code"
    return Draft(HEAD, inserts, tail, tuple(codes[:VALUES]), tuple(codes))


def needle_queries(setting: Setting) -> Draft:
    """Eight names with a code each, four of them asked for in one question."""
    names = names_of_things(setting.rng, 2 * QUERIES)
    codes = numbers(setting.rng, 2 * QUERIES)
    inserts = [(setting.rng.random(), written(*pair)) for pair in zip(names, codes, strict=True)]
    wanted = ", ".join(f"the {name}" for name in names[:QUERIES])
    tail = f"\nQuestion: which codes have {wanted}?\nAnswer: in this order they have code"
    return Draft(HEAD, inserts, tail, tuple(codes[:QUERIES]), tuple(codes))


def written(name: str, code: str) -> str:
    """The line that states a code."""
    return f"The {name} has code {code}.\n"


def asked(name: str) -> str:
    """The question for a code, up to where the code begins."""
    return f"\nQuestion: which code has the {name}?\nAnswer: the {name} has code"
