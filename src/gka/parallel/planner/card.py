"""Measured speed of a card: what a plan's times come from, as a small JSON file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gka.errors import InputError
from gka.models.flops import step_flops
from gka.storage import read_json

CARDS = Path(__file__).parent / "cards"
_NEEDED = [
    "name",
    "memory_gib",
    "peak_tflops",
    "product_tflops",
    "mixers",
    "solve_tflops",
    "traffic_tbs",
    "host_ms",
    "gap",
    "links_gbs",
]


@dataclass(frozen=True)
class Point:
    """A mixer's op, timed alone: B sequences of T tokens, H heads of K = V = dim.

    Attributes:
        forward_ms, both_ms: milliseconds forward, and forward and backward.
    """

    batch: int
    length: int
    heads: int
    dim: int
    forward_ms: float
    both_ms: float
    num_iter: int = 0

    def per_token(self) -> tuple[float, float]:
        """Seconds of a token and head, forward and backward."""
        each = 1e-3 / (self.batch * self.length * self.heads)
        return self.forward_ms * each, (self.both_ms - self.forward_ms) * each


@dataclass(frozen=True)
class Card:
    """A card and what was measured on it.

    Attributes:
        name: by torch. source: where, when and by which command the figures were measured.
        memory_gib: of the card. peak_tflops: dense bfloat16 products, by the data sheet.
        product_tflops: rate of a training step's matrix products, by the model's hidden size.
        mixers: ops timed alone.
        solve_tflops: rate of the solver's steps alone.
        traffic_tbs: TB/s of what is bound by memory: norms, convolutions, activations, loss, optimizer.
        host_ms: milliseconds that the host needs a micro-batch to launch: by mixer for a layer, "fixed", and
            for a layer that FSDP2 gathers "shards" more (0 where it is not given).
        gap: time of a step over the sum of its kernels, where the device is the bound.
        links_gbs: GB/s that a card's exchanges reach within a "node" and between nodes ("network").
    """

    name: str
    source: str
    memory_gib: float
    peak_tflops: float
    product_tflops: dict[int, float]
    mixers: dict[str, list[Point]]
    solve_tflops: float
    traffic_tbs: float
    host_ms: dict[str, float]
    gap: float
    links_gbs: dict[str, float]

    def product_rate(self, hidden: int) -> float:
        """FLOP/s of products at the measured hidden size that is nearest."""
        nearest = min(self.product_tflops, key=lambda width: abs(math.log(width / hidden)))
        return 1e12 * self.product_tflops[nearest]

    def solve_seconds(self, dim: int, num_iter: int) -> float:
        """One solve of a token and head."""
        return num_iter * step_flops(dim) / (1e12 * self.solve_tflops)

    def op_seconds(self, mixer: str, dim: int, length: int, num_iter: int) -> tuple[float, float]:
        """Of a token and head, forward and backward. Raises `InputError` if the mixer was not measured.

        A solver's steps count by their FLOPs; the rest, c1 K + c2 K^2 (traffic of the inputs and of the
        states), goes through the measured head sizes. Attention's time grows with T.
        """
        points = self.mixers.get("attention" if mixer == "swa" else mixer)
        if not points:
            raise InputError(
                f"{self.name}: {mixer} was not measured; known: {', '.join(self.mixers)}. Measure it with "
                "gka plan --measure FILE, and give --card FILE"
            )
        if mixer in ("attention", "swa"):
            return self._attention(points, dim, length)
        rests: dict[int, tuple[float, float]] = {}
        for point in points:
            solve = self.solve_seconds(point.dim, point.num_iter) if mixer == "gka" else 0.0
            forward, backward = point.per_token()
            rests[point.dim] = (forward - solve, backward - solve)
        own = self.solve_seconds(dim, num_iter) if mixer == "gka" else 0.0
        forward, backward = (
            _through({d: rest[i] for d, rest in rests.items()}, dim) for i in (0, 1)
        )
        return forward + own, backward + own

    def _attention(self, points: list[Point], dim: int, length: int) -> tuple[float, float]:
        """By FLOPs, at the rate of the measured length that is nearest."""
        near = min(points, key=lambda p: abs(math.log(p.length / length)))
        forward, backward = near.per_token()
        scale = length * dim / (near.length * near.dim)
        return forward * scale, backward * scale


def _through(rests: dict[int, float], dim: int) -> float:
    """c1 K + c2 K^2 through two points; proportional to K through one."""
    (a, x), *others = sorted(rests.items())
    if not others:
        return x * dim / a
    b, y = others[-1]
    square = (y / b - x / a) / (b - a)
    return max(0.0, (x / a - square * a) * dim + square * dim**2)


def card_names() -> list[str]:
    """Cards whose figures come with the package."""
    return sorted(path.stem for path in CARDS.glob("*.json"))


def read_card(name: str) -> Card:
    """A card of the package by name, or a file that `gka plan --measure` wrote.

    Raises:
        InputError: there is no such card, or the file lacks figures.
    """
    path = Path(name) if name.endswith(".json") else CARDS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(card_names())
        raise InputError(
            f"card {name!r} is unknown; known: {known}, or a .json file of gka plan --measure"
        )
    found: Any = read_json(path)
    missing = [key for key in _NEEDED if key not in found]
    if missing:
        raise InputError(f"card {path} lacks {', '.join(missing)}; measure it again")
    mixers = {
        mixer: [Point(**point) for point in points] for mixer, points in found["mixers"].items()
    }
    products = {int(width): rate for width, rate in found["product_tflops"].items()}
    rest = {key: found[key] for key in _NEEDED if key not in ("mixers", "product_tflops")}
    source = found.get("source", "")
    return Card(
        source=source if isinstance(source, str) else json.dumps(source),
        mixers=mixers, product_tflops=products, **rest,
    )  # fmt: skip
