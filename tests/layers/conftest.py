"""One small mixer of every kind, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gka.layers import MIXERS, build_mixer

HIDDEN = 24
WINDOW = 6
SIZES = {"hidden_size": HIDDEN, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "layer_idx": 0}


def make_mixer(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    window = {"window_size": WINDOW} if name == "swa" else {}
    return build_mixer(name, **{**SIZES, **window, **options}).double()


@pytest.fixture(params=MIXERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def mixer(name: str) -> nn.Module:
    return make_mixer(name)


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    return make_mixer


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Hidden states [B,T,HIDDEN], float64."""

    def draw(batch: int, length: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64)

    return draw
