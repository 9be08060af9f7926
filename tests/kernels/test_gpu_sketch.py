"""On a GPU: the sketched op against its definition, and decoding of a sketched model by a recorded step."""

from typing import Any

import pytest
import torch

from gka import GenerationSession
from gka.experiments.reproduce.sketch_speed import Shape, errors
from gka.models import GKAConfig, GKAForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (make test-gpu)"),
]


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("sketch", [16, 64])
def test_kernels_compute_the_definition(sketch: int, mixed: bool) -> None:
    """o and every gradient, the sketch's too, within bfloat16's tolerance of float64: d = 16 runs on Triton's
    kernels, d = 64 on Hopper's where there are any."""
    found = errors(Shape(1, 0, 8, 128, 0.0), sketch, "cuda", 70, mixed)
    assert set(found) >= {"o", "q", "k", "v", "g", "beta", "sketch"}


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_decoding_by_a_recorded_step(kind: str) -> None:
    """Greedy text and logits of a sketched model are those of launches one by one."""
    torch.manual_seed(0)
    made: Any = GKAForCausalLM(GKAConfig(
        vocab_size=97, hidden_size=256, num_heads=2, head_dim=128, num_hidden_layers=2, sketch_dim=32,
        sketch=kind, initializer_range=0.15,
    ))  # fmt: skip
    model = made.cuda().to(torch.bfloat16).eval()
    prompt = torch.randint(1, 97, (2, 70))
    recorded, plain = (GenerationSession(model, cuda_graph=x).append(prompt) for x in (True, False))
    found, expected = (torch.stack(list(s.generate(40)), 1) for s in (recorded, plain))
    assert torch.equal(found, expected) and recorded.why_not_graphed is None
    assert torch.equal(recorded.logits, plain.logits)  # type: ignore[arg-type]
