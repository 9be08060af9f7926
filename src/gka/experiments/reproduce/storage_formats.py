"""Formats in which a state can be stored between tokens, emulated in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WAYS = ("nearest", "feedback", "stochastic")


@dataclass(frozen=True)
class Format:
    """A way to store a state.

    Attributes:
        name: "float32", "bfloat16", "float16" or "int8" (a float32 scale for each row).
        way: "nearest"; "feedback": what rounding lost is stored in the same format and added at the next
            token, but not read; "stochastic": rounding up or down at random, right on average.
    """

    name: str
    way: str = "nearest"

    def __str__(self) -> str:
        return self.name if self.way == "nearest" else f"{self.name}, {self.way}"

    def bytes_per_entry(self, row: int) -> float:
        """Bytes that an entry takes in rows of length `row`, the feedback included."""
        size = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0 + 4.0 / row}[self.name]
        return 2.0 * size if self.way == "feedback" else size


FORMATS = (
    Format("float32"),
    *(Format(name, way) for name in ("bfloat16", "float16", "int8") for way in WAYS),
)


class Stored:
    """A float32 state that is kept in a format.

    Attributes:
        read: what is read back [...,K].
        lost: what rounding lost, None without feedback.
    """

    def __init__(self, state: Tensor, kind: Format, generator: torch.Generator) -> None:
        self.kind, self.generator = kind, generator
        self.read = state
        self.lost = torch.zeros_like(state) if kind.way == "feedback" else None
        self._round = _ROUNDINGS[kind.name]

    def update(self, gamma: float, write: Tensor) -> None:
        """S <- gamma S + write, and store it."""
        state = torch.add(write, self.read, alpha=gamma)
        if self.lost is not None:
            state.add_(self.lost, alpha=gamma)
        dither = None
        if self.kind.way == "stochastic":
            dither = torch.rand(state.shape, generator=self.generator, device=state.device)
        self.read = self._round(state, dither)
        if self.lost is not None:
            self.lost = self._round(state.sub_(self.read), None)


def _int8(x: Tensor, dither: Tensor | None) -> Tensor:
    """Rows of 8-bit integers with a scale each; dither in [0, 1) replaces rounding to nearest."""
    scale = x.abs().amax(-1, keepdim=True).div_(127.0).clamp_min_(torch.finfo(x.dtype).tiny)
    y = x / scale
    y = y.round_() if dither is None else y.add_(dither).floor_()
    return y.clamp_(-127.0, 127.0).mul_(scale)


def _float32(x: Tensor, dither: Tensor | None) -> Tensor:
    return x


def _bfloat16(x: Tensor, dither: Tensor | None) -> Tensor:
    """Upper 16 bits of float32; dither adds up to the lower ones before they are dropped."""
    if dither is None:
        return x.bfloat16().float()
    return ((x.view(torch.int32) + (dither * 65536.0).int()) & -65536).view(torch.float32)


def _float16(x: Tensor, dither: Tensor | None) -> Tensor:
    """float16; dither adds up to one unit of its 10 mantissa bits (24 fractional bits below 2^-14)."""
    if dither is None:
        return x.half().float()
    _, exponent = torch.frexp(x)
    unit = torch.ldexp(torch.ones_like(x), exponent.clamp_min(-13) - 11)
    return (x / unit).add_(dither).floor_().mul_(unit).half().float()


_ROUNDINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "float32": _float32,
    "bfloat16": _bfloat16,
    "float16": _float16,
    "int8": _int8,
}
