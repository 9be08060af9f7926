"""The memory test: recall error against the number of correlated pairs, in seconds, no training.

Keys are unit vectors with expected cosine `correlation` between any two, values random unit
vectors. All N pairs are written, then every key is read. Four measures per memory and N:

- error: |o - v| / |v|, Frobenius norms over all pairs, with scale = 1;
- rescaled_error: min over c of |c o - v| / |v|, one c for all pairs. A layer's output norm and
  projection make the overall size of o irrelevant, so this error remains in a layer;
- cosine: mean cosine of o_i and v_i;
- accuracy: fraction of pairs whose o_i is nearer in angle to v_i than to any other written value.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.errors import InputError
from gka.evaluation.memories import Memory
from gka.evaluation.results import check_entries

MEASURES = ("error", "rescaled_error", "cosine", "accuracy")


@dataclass(frozen=True)
class RecallSettings:
    """The pairs to write.

    Attributes:
        head_dim: K = V, the size of keys and values, 1 to 256.
        pairs: numbers N of pairs, each a separate test.
        correlations: expected cosines between two keys, each in [0, 1).
        seeds: independent draws of keys and values, for medians and ranges.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    head_dim: int = 64
    pairs: tuple[int, ...] = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)

    def __post_init__(self) -> None:
        if not 1 <= self.head_dim <= 256:
            raise InputError(f"head_dim is {self.head_dim}; expected 1 to 256")
        check_entries(pairs=self.pairs, correlations=self.correlations, seeds=self.seeds)
        if min(self.pairs) < 1:
            raise InputError(f"pairs holds {min(self.pairs)}; expected numbers of 1 or more")
        for rho in self.correlations:
            if not 0 <= rho < 1:
                raise InputError(f"correlations holds {rho}; expected numbers from 0 to below 1")


def correlated_keys(num: int, dim: int, correlation: float, generator: torch.Generator) -> Tensor:
    """Unit keys normalize(sqrt(rho) m + sqrt(1 - rho) z_i), float32 [num, dim], m and z_i random directions.

    The expected cosine of two keys is about rho = `correlation`.
    """
    common = normalize(torch.randn(1, dim, generator=generator), dim=-1)
    own = normalize(torch.randn(num, dim, generator=generator), dim=-1)
    return normalize(correlation**0.5 * common + (1 - correlation) ** 0.5 * own, dim=-1)


def draw_pairs(num: int, dim: int, correlation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one seed, both float32 [num, dim] with unit rows."""
    generator = torch.Generator().manual_seed(seed)
    keys = correlated_keys(num, dim, correlation, generator)
    return keys, normalize(torch.randn(num, dim, generator=generator), dim=-1)


def measure(o: Tensor, v: Tensor) -> dict[str, list[float]]:
    """The MEASURES of readouts o against written values v, both [B,N,V]: B values of each."""
    o, v = o.double(), v.double()
    size = torch.linalg.matrix_norm(v)
    best_scale = (o * v).sum((1, 2)) / o.square().sum((1, 2)).clamp_min(1e-300)
    cosines = normalize(o, dim=-1) @ normalize(v, dim=-1).mT
    right = cosines.argmax(-1) == torch.arange(v.shape[1])
    found = {
        "error": torch.linalg.matrix_norm(o - v) / size,
        "rescaled_error": torch.linalg.matrix_norm(best_scale[:, None, None] * o - v) / size,
        "cosine": cosines.diagonal(dim1=1, dim2=2).mean(-1),
        "accuracy": right.double().mean(-1),
    }
    return {name: [round(x, 6) for x in value.tolist()] for name, value in found.items()}


def run_recall(settings: RecallSettings, memories: Sequence[Memory]) -> dict[str, Any]:
    """Measure every memory at every (correlation, N), all seeds at once.

    Returns:
        JSON-ready {"settings", "memories", "measurements"}. A measurement has memory, correlation,
        pairs and, for each of MEASURES, the list of values over seeds.
    """
    measurements = []
    with torch.no_grad():
        for correlation in settings.correlations:
            for num in settings.pairs:
                drawn = [draw_pairs(num, settings.head_dim, correlation, s) for s in settings.seeds]
                k, v = (torch.stack(parts) for parts in zip(*drawn, strict=True))
                for memory in memories:
                    where = {"memory": memory.name, "correlation": correlation, "pairs": num}
                    measurements.append(where | measure(memory.recall(k, v), v))
    return {
        "settings": asdict(settings),
        "memories": [memory.describe() for memory in memories],
        "measurements": measurements,
    }


def main_memories(memories: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The memories of a result that plot and summary show, by role.

    Roles: "linear attention", "DeltaNet" (the first), "GKA" (ridge ratio nearest to the default 0.02, most
    steps), "smallest ridge" and "largest ridge" (GKA at other ratios), "exact ridge" (at GKA's ratio).
    """
    found: dict[str, dict[str, Any]] = {}
    for role, family in (("linear attention", "linear attention"), ("DeltaNet", "deltanet")):
        of_family = [m for m in memories if m["family"] == family]
        if of_family:
            found[role] = of_family[0]
    gka = [m for m in memories if m["family"] == "gka"]
    if gka:
        steps = max(m["num_iter"] for m in gka)
        by_ratio = {m["ridge_ratio"]: m for m in gka if m["num_iter"] == steps}
        ratio = min(by_ratio, key=lambda a: abs(math.log(a / 0.02)))
        found["GKA"] = by_ratio[ratio]
        for role, other in (("smallest ridge", min(by_ratio)), ("largest ridge", max(by_ratio))):
            if other != ratio:
                found[role] = by_ratio[other]
        for memory in memories:
            if (memory["family"], memory["ridge_ratio"]) == ("exact ridge", ratio):
                found["exact ridge"] = memory
    return found


def what_was_learnt(content: dict[str, Any]) -> list[str]:
    """A `run_recall` result in at most three sentences, with medians over seeds.

    They state which memories read the right values at the highest key cosine, which at the lowest (or with
    the most pairs), and GKA's errors. Unless said, the number of pairs is the one nearest to the head size.
    """
    settings, main = content["settings"], main_memories(content["memories"])
    pairs, dim = settings["pairs"], settings["head_dim"]
    num = min(pairs, key=lambda number: abs(number - dim))
    alike, unlike = max(settings["correlations"]), min(settings["correlations"])
    tests = [(alike, num, _right_values)]
    if unlike != alike:
        tests.append((unlike, num, _right_values))
    elif max(pairs) != num:
        tests.append((alike, max(pairs), _right_values))
    if "GKA" in main:
        tests.append((alike, num, _errors))
    return [
        f"{n} pair{'s' if n > 1 else ''}, key cosine {rho:g}: {say(_medians(content, rho, n), main)}"
        for rho, n, say in tests
    ]


def _medians(content: dict[str, Any], correlation: float, num: int) -> dict[str, dict[str, float]]:
    """Medians of the MEASURES of one test, by memory."""
    return {
        m["memory"]: {name: median(m[name]) for name in MEASURES}
        for m in content["measurements"]
        if (m["correlation"], m["pairs"]) == (correlation, num)
    }


def _right_values(found: dict[str, dict[str, float]], main: dict[str, dict[str, Any]]) -> str:
    shares = [
        (role, round(100 * found[main[role]["name"]]["accuracy"]))
        for role in ("GKA", "DeltaNet", "linear attention")
        if role in main
    ]
    (first, share), *rest = shares
    return f"{first} points to the right value in {share} of 100" + "".join(
        f", {role} in {n}" for role, n in rest
    )


def _errors(found: dict[str, dict[str, float]], main: dict[str, dict[str, Any]]) -> str:
    errors = {role: found[memory["name"]]["error"] for role, memory in main.items()}
    line = (
        f"GKA's relative error is {errors['GKA']:.2f} at ridge a = {main['GKA']['ridge_ratio']:g}"
    )
    if "exact ridge" in errors:
        line += f" (exact solution {errors['exact ridge']:.2f})"
    others = (role for role in ("smallest ridge", "largest ridge") if role in main)
    return line + "".join(f", {errors[r]:.2f} at {main[r]['ridge_ratio']:g}" for r in others)
