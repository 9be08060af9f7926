"""Documents that state facts and ask for them later, in the words of the tasks of `gka.evaluation.context`.

A small model that has never seen a question cannot answer one, whatever it remembers. Names and codes are
drawn anew in every document, so that none is worth learning by heart.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

from gka.evaluation.context import facts
from gka.evaluation.context.tasks import CODES_HEAD, asked, names_of_things, numbers, written

EVERY = 6  # lines of other text between two statements or questions, on average
PAIRS = 400  # statements of a document at most


def task_documents(lines: Sequence[str], size: int, seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of documents of about `size` characters without end: three with codes, then one of facts.

    Args:
        lines: other text, each with its line end.
        size: characters of a document; the shortest have a sixteenth.
        seed: of all random choices.
    """
    number = 0
    while True:
        rng = Random(f"{seed} {number}")
        most = int(size * 2 ** -rng.uniform(0, 4))
        make = facts_document if number % 4 == 3 else codes_document
        yield f"tasks-{number:06}", make(lines, most, rng)
        number += 1


def codes_document(lines: Sequence[str], size: int, rng: Random) -> str:
    """Codes stated between lines of other text, and asked for after a distance that is often short."""
    names, codes = names_of_things(rng, PAIRS), numbers(rng, PAIRS)
    pairs = list(zip(names, codes, strict=True))
    every = rng.choice((1, 2, EVERY, 3 * EVERY))
    at, stated, parts = rng.randrange(len(lines)), 0, [CODES_HEAD]
    held = 0
    while held < size:
        if stated == 0 or (rng.random() < 0.5 and stated < PAIRS):
            part = written(*pairs[stated])
            stated += 1
        else:
            name, code = pairs[stated - _back(stated, rng)]
            part = f"{asked(name)} {code}.\n"
        filled = int(rng.expovariate(1 / every))
        parts += [part, *(lines[(at + i) % len(lines)] for i in range(filled))]
        at += filled
        held = sum(map(len, parts))
    return "".join(parts)


def facts_document(lines: Sequence[str], size: int, rng: Random) -> str:
    """People and things that move in a small world, with questions where they are."""
    world = facts.World.draw(rng, people=4, places=6, things=2)
    parts, told, at, held = [facts.HEAD], 0, rng.randrange(len(lines)), 0
    every = rng.choice((0, 1, 3))
    while held < size:
        world.happen()
        parts += world.told[told:]
        told = len(world.told)
        if world.where and rng.random() < 0.25:
            person = rng.choice(sorted(world.where))
            place = world.where[person]
            question = f"\nQuestion: where is {person} now?\nAnswer: {person} is in the {place}.\n"
            parts.append(question)
        parts += islice(lines, at, at + every)
        at = (at + every) % len(lines)
        held = sum(map(len, parts))
    return "".join(parts)


def _back(stated: int, rng: Random) -> int:
    """How many statements back the one asked for lies, from 1 to `stated`: evenly on a log scale."""
    return min(stated, max(1, round(stated ** rng.random())))
