"""Tiny models of any pattern."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gka.models import GKAConfig, GKAForCausalLM

Build = Callable[..., GKAForCausalLM]

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_heads": 4,
    "sliding_window": 5,
    "num_iter": 6,
}


@pytest.fixture
def build() -> Build:
    """Constructor of a seeded tiny model in evaluation mode, e.g. `build(mixers=["gka", "swa"])`."""

    def model(seed: int = 0, **fields: Any) -> GKAForCausalLM:
        torch.manual_seed(seed)
        if "mixers" not in fields:
            fields.setdefault("num_hidden_layers", 2)
        return GKAForCausalLM(GKAConfig(**{**TINY, **fields})).eval()

    return model


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Random token ids [batch, length]; 0 is kept for padding."""

    def draw(batch: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw
