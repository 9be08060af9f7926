"""Words that prompts are made of: things, people, places, numbers, and words that mean nothing."""

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter blunt bold brisk calm clever coarse copper crisp curved dusty eager faint"
    " fierce flat fluffy frozen gentle glossy golden grim hollow humble icy ivory keen lazy lively"
    " lonely loud marble mellow misty narrow neat noble odd pale patient plain proud quaint quick"
    " quiet rapid rough rusty sharp shiny silent silver sleepy slim smoky solid steep stern sturdy"
    " subtle sunny sweet tidy timid tiny vivid warm wild wooden"
)
NOUNS = _words(
    "anchor badger barrel basket beacon beetle bridge candle canyon castle cedar comet condor coral"
    " cradle crater dagger desert dolphin donkey drum falcon feather fiddle forest fossil fountain"
    " galaxy garden glacier goblet hammer harbor harvest hazel heron island jacket jaguar kettle"
    " kitten ladder lagoon lantern lemon lizard magnet maple meadow mirror monsoon needle oyster"
    " paddle parrot pebble pepper pigeon pillow planet pocket puppet quarry rabbit raven ribbon"
    " saddle salmon shadow spider spruce stable tunnel turtle valley velvet violin walnut whistle"
)
PEOPLE = _words(
    "Agnes Boris Clara Dmitri Edith Felix Greta Hugo Irene Jonas Katya Leopold Marta Nils Olga"
    " Pavel Rosa Stefan Thea Viktor"
)
PLACES = _words(
    "attic bakery cellar chapel harbour kitchen library meadow office orchard stable tower"
)
THINGS = _words("apple book candle coin flute hammer key lamp letter map rope umbrella")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def numbers(rng: Random, count: int, digits: int = 7) -> list[str]:
    """`count` different numbers of `digits` digits."""
    first = 10 ** (digits - 1)
    return [str(number) for number in rng.sample(range(first, 10 * first), count)]


def names_of_things(rng: Random, count: int) -> list[str]:
    """`count` different names such as "rusty falcon", of three words where two give too few."""
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
    """`count` different words of six letters, consonants and vowels in turn, that mean nothing."""
    syllables = len(_CONSONANTS) * len(_VOWELS)
    return [
        "".join(_syllable(code // syllables**place % syllables) for place in range(3))
        for code in rng.sample(range(syllables**3), count)
    ]


def codes(rng: Random, count: int) -> list[str]:
    """`count` different names of five capital letters, such as those of variables."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [
        "".join(letters[code // 26**place % 26] for place in range(5))
        for code in rng.sample(range(26**5), count)
    ]


def _syllable(number: int) -> str:
    return _CONSONANTS[number // len(_VOWELS)] + _VOWELS[number % len(_VOWELS)]
