"""A model made without memory gets the weights that it would have had with memory."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.models import GKAConfig, GKAForCausalLM
from gka.parallel import without_memory

MIXERS = ["gka", "attention", "swa", "gla", "deltanet", "gated_deltanet"]
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, expanded heads": {"tie_word_embeddings": False, "kv_rank": 3, "kv_mix": True, "mixers": ["gka"],
                               "sketch_dim": 2},
    "experts": {
        "mixers": ["gka", "attention"],
        "moe": {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
            "layers": [0, 1],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_first_weights_are_those_of_a_model_with_memory(name: str) -> None:
    """Bit for bit, and the generator goes on as after it; until then no parameter has memory."""
    fields: dict[str, Any] = {
        "vocab_size": 31, "hidden_size": 16, "head_dim": 4, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_size": 24, "sliding_window": 8, "mixers": MIXERS, **MODELS[name],
    }  # fmt: skip

    def make() -> GKAForCausalLM:
        return GKAForCausalLM(GKAConfig(num_hidden_layers=len(fields["mixers"]), **fields))

    def seeded(call: Any) -> tuple[Any, Tensor]:
        torch.manual_seed(3)
        return call(), torch.rand(4)

    model, following = seeded(make)
    (other, first), same = seeded(lambda: without_memory(make))
    assert all(parameter.is_meta for parameter in other.parameters())
    before = torch.get_rng_state()
    first.fill(other, "cpu")
    assert torch.get_rng_state().equal(before) and same.equal(following)
    ours, theirs = other.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in theirs)


MEASURED = """
import resource, sys
import torch
from gka.models import GKAConfig, GKAForCausalLM
from gka.parallel import without_memory

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

sizes = {"hidden_size": 640, "head_dim": 128, "num_hidden_layers": 20}

def make():
    return GKAForCausalLM(GKAConfig(vocab_size=8000, **sizes))

without_memory(lambda: GKAForCausalLM(GKAConfig(hidden_size=64, head_dim=16, num_hidden_layers=1)))
before = peak()
model, first = without_memory(make)
made = peak() - before
first.fill(model, "cpu")
print(made, peak() - before, 4 * model.num_parameters())
"""


@pytest.mark.slow
def test_memory_of_a_start() -> None:
    """Made without memory a model adds less than a tenth of its size to the peak; filled, its size and no
    more than that."""
    told = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    made, filled, size = map(int, told.stdout.split())
    assert made < 0.1 * size and filled < 1.1 * size
