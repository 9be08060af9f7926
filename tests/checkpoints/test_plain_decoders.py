"""Qwen2, Qwen3, Qwen3-MoE, Llama and Mistral folders as models of this library, no layer replaced."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from gka.checkpoints import save_as
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from tolerances import RELATIVE, assert_close

Ids = Callable[..., Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
WIDE: dict[str, Any] = SIZES | {"head_dim": 32}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
MODELS: dict[str, Any] = {
    "qwen3": Qwen3Config(**SIZES, head_dim=24, rms_norm_eps=1e-5),
    "qwen3 biases tied": Qwen3Config(**SIZES, head_dim=24, attention_bias=True, tie_word_embeddings=True),
    "qwen3 yarn": Qwen3Config(**SIZES, head_dim=24, rope_parameters=YARN),
    "qwen3 linear": Qwen3Config(**SIZES, head_dim=24, rope_parameters=LINEAR),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 windows": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**WIDE, sliding_window=9),
    "mistral full": MistralConfig(**SIZES, sliding_window=None),
    "qwen3 moe": Qwen3MoeConfig(
        **WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        mlp_only_layers=[1], norm_topk_prob=True,
    ),
}  # fmt: skip


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """transformers' model with lively weights, and the folder it saved them in."""
    torch.manual_seed(0)
    reference: Any = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[request.param]))
    for name, value in reference.named_parameters():
        if "norm" in name:
            value.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            value.data.normal_(0, 0.1)
        else:
            value.data.mul_(3)
    reference.save_pretrained(tmp_path / "theirs")
    return reference.eval(), tmp_path / "theirs"


@pytest.mark.parametrize("saved", MODELS, indirect=True)
def test_logits_are_transformers_own(saved: tuple[Any, Path], tmp_path: Path, ids: Ids):
    """In float32 on a CPU the logits equal transformers' bit for bit; written back, so do all weights."""
    reference, folder = saved
    tokens = ids(2, 40)
    model = GKAForCausalLM.from_pretrained(folder).eval()
    expected = reference(tokens, use_cache=False).logits
    assert torch.equal(model(tokens).logits, expected) and expected.std() > 0.3
    assert set(model.config.pattern) <= {"attention", "swa"}
    save_as(model, tmp_path / "again", reference.config.model_type)
    found, stored = (load_file(x / "model.safetensors") for x in (tmp_path / "again", folder))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens, use_cache=False).logits, expected)
    model.save_pretrained(tmp_path / "ours")
    ours = GKAForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(ours(tokens).logits, expected)


@pytest.mark.parametrize(
    "saved", ["qwen3", "qwen2 windows", "llama 3", "mistral", "qwen3 moe"], indirect=True
)
def test_padding_gradients_and_generation(saved: tuple[Any, Path], ids: Ids):
    """Left padding, the loss's gradient and greedy tokens are transformers' too."""
    reference, folder = saved
    model, tokens = GKAForCausalLM.from_pretrained(folder).eval(), ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    ours = model(tokens, attention_mask=mask).logits
    theirs = reference(tokens, attention_mask=mask, use_cache=False).logits
    assert_close(ours[0], theirs[0], RELATIVE[torch.float32])
    assert_close(ours[1, 6:], theirs[1, 6:], RELATIVE[torch.float32])
    for one in (model, reference):
        one(tokens, labels=tokens, use_cache=False).loss.backward()
    ours, theirs = (x.get_input_embeddings().weight.grad for x in (model, reference))
    assert_close(ours, theirs, 5 * RELATIVE[torch.float32])  # summed over the batch in other orders
    choice: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found, expected = (
        one.generate(tokens, attention_mask=mask, **choice) for one in (model, reference)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("saved", ["llama 3"], indirect=True)
def test_scaled_positions_survive_casts(saved: tuple[Any, Path], ids: Ids):
    """Rotary angles are no weights: a model cast to bfloat16 and back has the angles it had."""
    _, folder = saved
    model, tokens = GKAForCausalLM.from_pretrained(folder), ids(1, 20)
    mixer: Any = model.get_submodule("model.layers.0.mixer")
    before = mixer._inv_freq.clone()
    model.bfloat16()(tokens)
    assert torch.equal(mixer._inv_freq, before) and mixer._inv_freq.dtype == torch.float32
    plain = GKAForCausalLM.from_pretrained(folder, rope_options=None)
    assert not torch.equal(plain(tokens).logits, model.float()(tokens).logits)


def test_a_layer_is_replaced_by_naming_another_mixer(tmp_path: Path):
    """The configuration read from a Qwen3 folder describes the primed model with one field changed."""
    MODELS["qwen3"].save_pretrained(tmp_path)
    config = GKAConfig.from_pretrained(tmp_path)
    assert GKAConfig.get_config_dict(tmp_path)[0]["mixers"] == ["attention"] * 3
    config.mixers = ["attention", "gka", "attention"]
    model = GKAForCausalLM(config)
    mixer: Any = model.get_submodule("model.layers.1.mixer")
    assert (mixer.num_heads, mixer.num_k_heads, mixer.head_dim) == (4, 2, 24)
    assert mixer.q_proj.weight.shape == (96, 64) and mixer.o_proj.weight.shape == (64, 96)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_options": {"rope_type": "longrope"}},
            "rope_type must be one of linear, yarn, llama3",
        ),
        ({"rope_options": {"rope_type": "yarn"}}, "rope_options of type 'yarn'"),
        (
            {"mixer_overrides": {"gla": {"num_iter": 3}}},
            r"mixer_overrides\['gla'\]: no option 'num_iter'",
        ),
        ({"mixer_overrides": {"mamba": {}}}, "mixer_overrides: unknown mixer 'mamba'"),
        ({"mixer_overrides": {"gka": 3}}, "expected a table of options, got 3"),
        ({"moe": {"num_experts": 4}}, "moe: expected num_experts, num_experts_per_tok, moe_inter"),
        ({"kv_rank": 0}, "kv_rank: expected more than 0"),
        ({"num_k_heads": 3}, "num_k_heads = 3, num_v_heads = 3 must divide 4"),
        ({"num_k_heads": 2, "num_kv_heads": 2}, "both count key heads"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, Any], message: str):
    """New options are refused by name where they make no sense."""
    with pytest.raises(InputError, match=message):
        GKAConfig(mixers=["gka", "attention"], num_heads=4, head_dim=8, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a positive int, got 0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 exceeds num_experts = 4"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be a bool, got 1"),
        ({"layers": [5]}, r"layers \[5\] lie outside the 2 layers"),
    ],
)
def test_experts_that_do_not_fit(changes: dict[str, Any], message: str):
    """Numbers of experts are checked before a model is built."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "layers": [0],
           "norm_topk_prob": True}  # fmt: skip
    GKAConfig(mixers=["gka", "gka"], moe=moe)
    with pytest.raises(InputError, match=message):
        GKAConfig(mixers=["gka", "gka"], moe=moe | changes)


@pytest.mark.parametrize("mix", [False, True])
def test_expansions_start_as_repetitions(mix: bool, tmp_path: Path):
    """In a new model, and where a stored one lacks them, learned expansions repeat the heads."""
    config = GKAConfig(
        vocab_size=97, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mixers=["gka"], kv_rank=3,
        kv_mix=mix,
    )  # fmt: skip
    model = GKAForCausalLM(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "_expand" not in k}
    save_file(kept, file, metadata={"format": "pt"})
    for one in (model, GKAForCausalLM.from_pretrained(tmp_path)):
        mixer: Any = one.get_submodule("model.layers.0.mixer")
        for expansion in (mixer.k_expand, mixer.v_expand):
            assert not expansion.up.weight.any() and expansion.down.weight.std() > 0.01
            if mix:
                assert torch.equal(expansion.mix, torch.eye(2).repeat_interleave(2, 0))


def test_experts_start_as_matrices_do(ids: Ids):
    """A new mixture of experts has weights of initializer_range, all of it trained."""
    moe = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "layers": [1],
           "norm_topk_prob": True}  # fmt: skip
    torch.manual_seed(0)
    model = GKAForCausalLM(
        GKAConfig(vocab_size=97, hidden_size=64, num_heads=2, head_dim=8, mixers=["gka", "gka"], moe=moe,
                  initializer_range=0.05)
    )  # fmt: skip
    parts = {n: p for n, p in model.named_parameters() if ".1.mlp." in n}
    assert len(parts) == 3 and all(abs(p.std().item() - 0.05) < 0.01 for p in parts.values())
    model(ids(2, 9), labels=ids(2, 9)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in parts.values())
