"""Decode kernels that are compared: by backend, solver setting and storage dtype of U."""

from dataclasses import dataclass
from typing import Any

import torch

SOLVES: dict[str, dict[str, Any]] = {
    "chebyshev 10": {"solver": "chebyshev", "num_iter": 10},
    "chebyshev 30": {"solver": "chebyshev", "num_iter": 30},
    "adaptive 30": {"solver": "adaptive", "num_iter": 30},
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DecodeKernel:
    """A decode kernel for single tokens, with one solver setting and one storage dtype of U."""

    backend: str
    solve: str
    stored: str

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.solve}, U {self.stored}"


def decode_kernels(cuda: bool) -> list[DecodeKernel]:
    """All decode kernels of a device."""
    backends = ("hopper", "triton") if cuda else ("torch",)
    return [
        DecodeKernel(backend, solve, stored)
        for backend in backends for solve in SOLVES for stored in STORED
    ]  # fmt: skip
