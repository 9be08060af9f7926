"""The trainings of `mqar` by model and setting: accuracies with intervals, and where a setting is solved."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from gka.experiments.reproduce.experiment import Found
from gka.experiments.reproduce.mqar_models import MIXERS

SOLVED = 0.99
STOP = 0.995  # on validation: so that what is stopped there is solved on the test set, too
Key = tuple[int, int, str, int, int]
# Student's t for 95 % intervals, by degrees of freedom from 1 on
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
OURS = ("gka", "gka_ungated")


@dataclass(frozen=True)
class Gate:
    """A baseline that its authors show solving a setting from a width on; if it fails here, we erred."""

    mixer: str
    least_width: int
    holds: Callable[[int, int], bool]
    source: str


GATES = (
    Gate("attention", 64, lambda tokens, pairs: True, "Zoology, arXiv 2312.04927, figure 2"),
    Gate("deltanet", 64, lambda tokens, pairs: tokens <= 512 and pairs <= 64,
         "DeltaNet, arXiv 2406.06484, its MQAR figure"),
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A model in a setting.

    Attributes:
        tokens, pairs, mixer, width, expand: which.
        search: the first seed's figures by rate.
        rate: the best on validation; of equals that with the fewest steps.
        runs: figures at this rate, one a seed.
    """

    tokens: int
    pairs: int
    mixer: str
    width: int
    expand: int
    search: Mapping[float, Found]
    rate: float
    runs: Sequence[Found]

    @property
    def mean(self) -> float:
        """Mean share of test queries answered right."""
        return fmean(r["test"] for r in self.runs)

    @property
    def margin(self) -> float | None:
        """Half of the 95 % interval of the mean; None for one seed."""
        count = len(self.runs)
        if count < 2:
            return None
        t = _T95[count - 2] if count - 2 < len(_T95) else 1.96
        return t * stdev(r["test"] for r in self.runs) / sqrt(count)

    @property
    def solved(self) -> bool:
        return self.mean >= SOLVED

    @property
    def at_edge(self) -> bool:
        """Whether a wider search of rates might do better."""
        rates = self.search.keys()
        return len(rates) >= 3 and self.rate in (min(rates), max(rates)) and not self.solved

    @property
    def bytes(self) -> int:
        return self.runs[0]["state_bytes"]

    @property
    def label(self) -> str:
        wide = "" if self.expand == 1 else f", V = {self.expand} K"
        return MIXERS[self.mixer].style[0] + wide

    def __str__(self) -> str:
        if self.margin is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.margin:.3f}"


Groups = Mapping[Key, Group]


def groups_of(results: Sequence[Found]) -> Groups:
    """Groups by (tokens, pairs, mixer, width, expand)."""
    parts: dict[Key, list[Found]] = {}
    for r in results:
        key = (r["tokens"], r["pairs"], r["mixer"], r["width"], r["expand"])
        parts.setdefault(key, []).append(r)
    first = min((r["seed"] for r in results), default=0)
    found = {}
    for key, members in parts.items():
        search = {r["rate"]: r for r in members if r["seed"] == first}
        best = max(search.values(), key=lambda r: (r["validation"], -r["steps"]))
        runs = [r for r in members if r["rate"] == best["rate"]]
        found[key] = Group(*key, search, best["rate"], runs)
    return found


def settings_of(groups: Groups) -> list[tuple[int, int]]:
    """Tokens and pairs, in the order in which they were begun."""
    return list(dict.fromkeys((g.tokens, g.pairs) for g in groups.values()))


def members(
    groups: Groups, setting: tuple[int, int], expand: int | None = 1, mixers: Iterable[str] = MIXERS
) -> list[Group]:
    """A setting's groups with that V over K (None: any), narrow models first, in the order of `MIXERS`."""
    order = {name: place for place, name in enumerate(MIXERS)}
    chosen = [
        g
        for g in groups.values()
        if (g.tokens, g.pairs) == setting and expand in (None, g.expand) and g.mixer in set(mixers)
    ]
    return sorted(chosen, key=lambda g: (g.expand, order[g.mixer], g.width))


def why_not_shown(groups: Groups, setting: tuple[int, int]) -> str | None:
    """Why a setting decides nothing: a baseline fails here that its authors show solving it."""
    for gate in GATES:
        if not gate.holds(*setting):
            continue
        for g in members(groups, setting, mixers=(gate.mixer,)):
            if g.width >= gate.least_width and not g.solved:
                return (
                    f"{g.label} of width {g.width} reaches {g.mean:.3f}, where its authors show it solved"
                    f" ({gate.source})"
                )
    return None


def shown_settings(groups: Groups) -> list[tuple[int, int]]:
    return [s for s in settings_of(groups) if why_not_shown(groups, s) is None]


def smallest(groups: Groups, setting: tuple[int, int], mixer: str) -> Group | None:
    """The solving model of a mixer with the fewest state bytes, K = V; None if none solves the setting."""
    solving = [g for g in members(groups, setting, mixers=(mixer,)) if g.solved]
    return min(solving, key=lambda g: g.bytes, default=None)


def decisive(groups: Groups, setting: tuple[int, int]) -> list[int]:
    """Widths at which some mixer solves the setting and some does not."""
    found: dict[int, set[bool]] = {}
    for g in members(groups, setting):
        found.setdefault(g.width, set()).add(g.solved)
    return sorted(width for width, solved in found.items() if len(solved) == 2)


def size_of(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1024:.3g} KiB" if count < 1 << 20 else f"{count / (1 << 20):.3g} MiB"


def name_of(setting: tuple[int, int]) -> str:
    return f"{setting[1]} pairs in {setting[0]} tokens"
