"""Facts of small worlds, spread through a long text: who is where, and who has what."""

from dataclasses import dataclass, field
from random import Random

from gka.evaluation.context.haystack import Draft, Setting

PEOPLE = str.split(
    "Agnes Boris Clara Dmitri Edith Felix Greta Hugo Irene Jonas Katya Leopold Marta Nils Olga"
    " Pavel Rosa Stefan Thea Viktor"
)
PLACES = str.split(
    "attic bakery cellar chapel harbour kitchen library meadow office orchard stable tower"
)
THINGS = str.split("apple book candle coin flute hammer key lamp letter map rope umbrella")
HEAD = "Remember who goes where and who has what.\n"
NUMBERS = ("nothing", "one", "two", "three")


@dataclass
class World:
    """People in places, with things; every change is a sentence.

    Attributes:
        rng: source of randomness.
        people, places, things: their names.
        where: place of each person who has moved.
        holder: person who holds each thing, for things that are held.
        lying: place of each thing that was put down and lies there.
        path: places of each thing that was ever taken, in order.
        told: the sentences.
    """

    rng: Random
    people: list[str]
    places: list[str]
    things: list[str]
    where: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    lying: dict[str, str] = field(default_factory=dict)
    path: dict[str, list[str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, rng: Random, people: int, places: int, things: int) -> "World":
        """A world with these numbers of people, places and things, without events."""
        return cls(
            rng, rng.sample(PEOPLE, people), rng.sample(PLACES, places), rng.sample(THINGS, things)
        )

    def move(self, person: str, place: str | None = None) -> None:
        """The person goes to `place` (None: a random other one) with the things they hold."""
        place = place or self.rng.choice([p for p in self.places if p != self.where.get(person)])
        self.where[person] = place
        self.told.append(f"{person} went to the {place}.\n")
        for thing in self.held(person):
            self.path[thing].append(place)

    def take(self, person: str, thing: str) -> None:
        """The person, who must have moved before, picks up the thing."""
        self.holder[thing] = person
        self.lying.pop(thing, None)
        self.told.append(f"{person} took the {thing}.\n")
        place = self.where[person]
        if self.path.setdefault(thing, [place])[-1] != place:
            self.path[thing].append(place)

    def drop(self, thing: str) -> None:
        """The holder of the thing puts it down."""
        person = self.holder.pop(thing)
        self.lying[thing] = self.where[person]
        self.told.append(f"{person} put down the {thing}.\n")

    def held(self, person: str) -> list[str]:
        """The things that the person holds."""
        return [thing for thing, holder in self.holder.items() if holder == person]

    def happen(self) -> None:
        """A random event: a person moves, takes a thing that lies there or was never taken, or drops one."""
        person = self.rng.choice(self.people)
        here = self.where.get(person)
        free = [t for t in self.things if t not in self.holder and self.lying.get(t, here) == here]
        choice = self.rng.random()
        if here and free and choice < 0.3:
            self.take(person, self.rng.choice(free))
        elif self.held(person) and choice < 0.4:
            self.drop(self.rng.choice(self.held(person)))
        else:
            self.move(person)


def one_fact(setting: Setting) -> Draft:
    """Where is a person? Four people move; the last move of the person in question gives the answer."""
    world = World.draw(setting.rng, people=4, places=6, things=1)
    for person in world.people:
        world.move(person)
    for _ in range(4):
        world.move(setting.rng.choice(world.people))
    person = setting.rng.choice(world.people)
    tail = f"\nQuestion: where is {person} now?\nAnswer: {person} is in the"
    return _spread(setting, world, tail, world.where[person], world.places)


def two_facts(setting: Setting) -> Draft:
    """Where is a thing? A person took it and moved on: the answer takes two facts."""
    world = World.draw(setting.rng, people=3, places=6, things=2)
    carrier, thing = world.people[0], world.things[0]
    world.move(carrier)
    world.take(carrier, thing)
    for _ in range(6):
        _without(world, thing)
    world.move(carrier)
    for person in world.people[1:]:
        world.move(person)
    tail = f"\nQuestion: where is the {thing} now?\nAnswer: the {thing} is in the"
    return _spread(setting, world, tail, world.path[thing][-1], world.places)


def three_facts(setting: Setting) -> Draft:
    """Where was a thing before it came to a place? Three facts: who took it, and that person's moves."""
    world = World.draw(setting.rng, people=3, places=6, things=2)
    carrier, thing = world.people[0], world.things[0]
    first, second, third = world.places[:3]
    world.move(carrier, first)
    world.take(carrier, thing)
    for place in (second, third):
        for _ in range(3):
            _without(world, thing, still=carrier)
        world.move(carrier, place)
    world.drop(thing)
    world.move(carrier)
    tail = (
        f"\nQuestion: where was the {thing} before it came to the {third}?"
        f"\nAnswer: before, the {thing} was in the"
    )
    candidates = [place for place in world.places if place != third]
    return _spread(setting, world, tail, second, candidates)


def counted_facts(setting: Setting) -> Draft:
    """How many things does a person have? "nothing" to "three", after taking and putting down."""
    rng = setting.rng
    world = World.draw(rng, people=2, places=4, things=6)
    owner, other = world.people
    world.move(owner)
    world.move(other)
    wanted, extra = rng.randrange(4), rng.randrange(3)
    for thing in world.things[: wanted + extra]:
        world.take(owner, thing)
    world.take(other, world.things[5])
    for thing in rng.sample(world.held(owner), extra):
        world.drop(thing)
    world.move(owner)
    tail = f"\nQuestion: how many things does {owner} have now?\nAnswer: {owner} has"
    return _spread(setting, world, tail, NUMBERS[wanted], NUMBERS)


def checked_facts(setting: Setting) -> Draft:
    """Is a person in a place? Yes and no are equally often right."""
    rng = setting.rng
    world = World.draw(rng, people=4, places=6, things=1)
    for person in world.people:
        world.move(person)
    for _ in range(4):
        world.move(rng.choice(world.people))
    person = rng.choice(world.people)
    is_there = rng.random() < 0.5
    here = world.where[person]
    place = here if is_there else rng.choice([p for p in world.places if p != here])
    tail = f"\nQuestion: is {person} in the {place} now, yes or no?\nAnswer:"
    return _spread(setting, world, tail, "yes" if is_there else "no", ("yes", "no"))


def _without(world: World, thing: str, still: str | None = None) -> None:
    """A random event that changes neither the thing's holder nor the place of the person `still`."""
    while True:
        told, state = len(world.told), (dict(world.where), dict(world.holder), dict(world.lying))
        paths = {name: list(places) for name, places in world.path.items()}
        world.happen()
        moved = still and world.where.get(still) != state[0].get(still)
        if not moved and world.holder.get(thing) == state[1].get(thing):
            return
        del world.told[told:]
        world.where, world.holder, world.lying, world.path = *state, paths


def _spread(
    setting: Setting,
    world: World,
    tail: str,
    answer: str,
    candidates: "list[str] | tuple[str, ...]",
) -> Draft:
    """The world's sentences at random depths, in the order of events."""
    depths = sorted(setting.rng.random() for _ in world.told)
    return Draft(
        HEAD,
        list(zip(depths, world.told, strict=True)),
        tail,
        (answer,),
        tuple(candidates),
        hidden=tuple(world.people),
    )
