"""Tiny models of any pattern, and tokens for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gka.models import GKAConfig, GKAForCausalLM

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
def build() -> Callable[..., GKAForCausalLM]:
    """Constructor of a seeded tiny model, e.g. `build(mixers=["gka", "swa"])`.

    Weights are larger than at the start of training, so that greedy text is no constant.
    """

    def model(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> GKAForCausalLM:
        torch.manual_seed(seed)
        if "mixers" not in fields:
            fields.setdefault("num_hidden_layers", 2)
        fields = {"initializer_range": 0.15, **TINY, **fields}
        model: Any = GKAForCausalLM(GKAConfig(**fields))
        return model.to(dtype).eval()

    return model


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Random token ids [batch, length]; 0 is kept for padding."""

    def draw(batch: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw
