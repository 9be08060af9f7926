"""Which kernels a model's baselines run through: what its configuration says, and what it refuses."""

from typing import Any

import pytest
import torch

from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from gka.ops import last_backend
from scripted_kernels import libraries

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 128, "num_heads": 1, "head_dim": 128}


def mixers(**options: Any) -> list:
    config = GKAConfig(**SIZES, mixers=["gka", "gated_deltanet", "gla"], **options)
    model: Any = GKAForCausalLM(config)
    return [layer.mixer for layer in model.model.layers]


def test_a_backend_of_gka_leaves_the_delta_rule_its_own_choice():
    """Kernels of GKA's op have no delta rule, which then stays "auto"; plain torch is plain torch throughout;
    an override names a library for one mixer."""
    for backend, expected in (("triton", "auto"), ("torch", "torch"), ("reference", "torch")):
        assert [x.backend for x in mixers(backend=backend)] == [backend, expected, backend]
    named = mixers(mixer_overrides={"gated_deltanet": {"backend": "flash_qla"}})
    assert [x.backend for x in named] == ["auto", "flash_qla", "auto"]


def test_unknown_backends_are_refused():
    """A baseline's backend is checked when the model is built."""
    with pytest.raises(InputError, match="one of flash_qla, fla, auto, torch; got 'hopper'"):
        mixers(mixer_overrides={"gated_deltanet": {"backend": "hopper"}})
    with pytest.raises(InputError, match="one of flash_qla, fla, auto, hopper"):
        mixers(mixer_overrides={"gla": {"backend": "cuda"}})


@pytest.mark.parametrize(
    "mixer, name", [("gated_deltanet", "flash_qla"), ("deltanet", "fla"), ("gla", "fla")]
)
def test_a_named_library_reads_prompts_and_leaves_tokens_to_us(mixer, name):
    """A whole sequence runs through the library; tokens after it do not, and go on from its state."""
    torch.manual_seed(0)
    config = GKAConfig(
        **SIZES, num_hidden_layers=1, mixer=mixer, mixer_overrides={mixer: {"backend": name}}
    )
    model: Any = GKAForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    ids = torch.randint(32, (1, 40))
    with torch.no_grad():
        model.model.layers[0].mixer.backend = "torch"
        expected = model(ids).logits[:, -1]
        model.model.layers[0].mixer.backend = name
        with libraries():
            cache = model(ids[:, :39], use_cache=True).past_key_values
            assert last_backend() == name
            found = model(ids[:, 39:], past_key_values=cache).logits[:, -1]
            assert last_backend() != name
    assert (found - expected).float().norm() < 0.05 * expected.float().norm()
