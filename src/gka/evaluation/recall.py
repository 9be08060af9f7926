"""The memory test: recall error against the number of correlated pairs, in seconds, no training.

Keys are unit vectors with expected cosine `correlation` between any two, values random unit
vectors. All N pairs are written, then every key is asked for. Four numbers per memory and N:

- error: |o - v| / |v| over all pairs (2-norms), with scale = 1, nothing adjusted;
- rescaled_error: min over c of |c o - v| / |v|, one c for all pairs: what is left after the output
  norm and projection of a layer, which make the overall size of o irrelevant;
- cosine: mean cosine of o_i and v_i;
- accuracy: fraction of pairs whose o_i is nearer in angle to v_i than to any other written value.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.errors import InputError
from gka.evaluation.memories import Memory

MEASURES = ("error", "rescaled_error", "cosine", "accuracy")


@dataclass(frozen=True)
class RecallSettings:
    """What is written, and how often.

    Attributes:
        head_dim: K = V, the size of keys and values.
        pairs: numbers N of pairs, each a test of its own.
        correlations: expected cosines between two keys, each in [0, 1).
        seeds: independent draws of keys and values; medians and spreads are taken over them.

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
        for name in ("pairs", "correlations", "seeds"):
            entries = getattr(self, name)
            if not entries or len(set(entries)) != len(entries):
                raise InputError(f"{name} is {entries}; expected one or more different values")
        if min(self.pairs) < 1:
            raise InputError(f"pairs holds {min(self.pairs)}; expected numbers of 1 or more")
        for rho in self.correlations:
            if not 0 <= rho < 1:
                raise InputError(f"correlations holds {rho}; expected numbers from 0 to below 1")


def correlated_keys(num: int, dim: int, correlation: float, generator: torch.Generator) -> Tensor:
    """Unit keys normalize(sqrt(rho) m + sqrt(1 - rho) z_i) [num, dim], m and z_i random directions.

    The expected cosine of two keys is about rho = `correlation`.
    """
    common = normalize(torch.randn(1, dim, generator=generator), dim=-1)
    own = normalize(torch.randn(num, dim, generator=generator), dim=-1)
    return normalize(correlation**0.5 * common + (1 - correlation) ** 0.5 * own, dim=-1)


def draw_pairs(num: int, dim: int, correlation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one seed, both float32 [num, dim] of unit rows."""
    generator = torch.Generator().manual_seed(seed)
    keys = correlated_keys(num, dim, correlation, generator)
    return keys, normalize(torch.randn(num, dim, generator=generator), dim=-1)


def measure(o: Tensor, v: Tensor) -> dict[str, list[float]]:
    """The MEASURES of what was read, o, against what was written, v: both [B,N,V], a value per B."""
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
    """Every memory on every (correlation, N), all seeds at once.

    Returns:
        JSON-ready {"settings", "memories", "measurements"}; a measurement has memory, correlation,
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
