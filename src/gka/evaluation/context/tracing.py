"""Variable tracking: which names hold a number that was handed on from name to name."""

from itertools import pairwise

from gka.evaluation.context.prompt import Draft, Setting
from gka.evaluation.context.vocabulary import codes, numbers

HOPS = 4


def variables(setting: Setting) -> Draft:
    """A chain of five names along which a number is handed on, and a second chain with another number.

    All names of the first chain are asked for; those of the second are the other candidates.
    """
    rng = setting.rng
    names = codes(rng, 2 * (HOPS + 1))
    values = numbers(rng, 2, digits=5)
    inserts = []
    for chain, value in zip((names[: HOPS + 1], names[HOPS + 1 :]), values, strict=True):
        lines = [f"Set {chain[0]} to {value}.\n"]
        lines += [f"Set {b} to {a}.\n" for a, b in pairwise(chain)]
        places = sorted(rng.random() for _ in lines)  # no name before what it holds
        inserts += zip(places, lines, strict=True)
    return Draft(
        head="Remember what each name is set to.\n",
        inserts=inserts,
        tail=f"\nQuestion: which {HOPS + 1} names are {values[0]} in the end?\nAnswer:",
        answers=tuple(names[: HOPS + 1]),
        candidates=tuple(names),
        hidden=tuple(values),
    )
