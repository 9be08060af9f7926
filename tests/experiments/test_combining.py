"""The experiment of combined states scores what it says."""

from typing import Any

import pytest
import torch

from gka.experiments import combining
from gka.models import GKAConfig, GKAForCausalLM

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "num_iter": 4,
}


def test_combining_scores_every_way() -> None:
    """Reading in turn is the uncached model's own score, and reading nothing that of the continuation."""
    torch.manual_seed(0)
    model: Any = GKAForCausalLM(GKAConfig(vocab_size=32000, **TINY)).eval()
    text = torch.randint(32000, (1, 60), generator=torch.Generator().manual_seed(0))
    found = combining.one(model, text, 2, 20)
    assert set(found) == set(combining.WAYS)
    for way, seen in (("read in turn", text), ("nothing", text[:, 40:])):
        with torch.no_grad():
            logits = model(seen, use_cache=False).logits[0, -17:-1]
        expected = torch.nn.functional.cross_entropy(logits, seen[0, -16:]) / torch.log(
            torch.tensor(2.0)
        )
        assert found[way] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(found.values())) == len(found)
