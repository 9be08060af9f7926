"""Recurrent layers begin from the weights of the attention whose place they take, gates neutral."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gka.checkpoints.save import save_as
from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.replacement import REPLACEMENTS, Start, replace_attention

Build = Callable[..., GKAForCausalLM]
GROUPED: dict[str, Any] = {"mixer": "attention", "num_hidden_layers": 3, "num_kv_heads": 2}


def mixer_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mixer


def log_decay(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """-exp(A_log) softplus(a_proj x + dt_bias)."""
    softplus = torch.nn.functional.softplus
    return -mixer.A_log.exp() * softplus(mixer.a_proj(x) + mixer.dt_bias)


@pytest.fixture(params=REPLACEMENTS)
def mixer(request: pytest.FixtureRequest) -> str:
    return request.param


def test_projections_are_copied(build: Build, mixer: str) -> None:
    """q, k, v and o are the attention's, grouped heads kept; layers not named stay as they are."""
    model = build(**GROUPED)
    kept = mixer_of(model, 1)
    old = replace_attention(model, [0, 2], mixer)
    assert model.config.pattern == [mixer, "attention", mixer]
    assert mixer_of(model, 1) is kept
    for layer, attention in old.items():
        new: Any = mixer_of(model, layer)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(new, name).weight.equal(getattr(attention, name).weight)
        assert (new.num_heads, new.num_k_heads, new.num_v_heads) == (4, 2, 2)


def test_output_gate_is_half_of_either(build: Build, mixer: str) -> None:
    """Row (h, i) of g_proj is half of column (h, i) of o_proj plus half of row i of h's value head."""
    model = build(**GROUPED)
    attention = replace_attention(model, [0], mixer)[0]
    gate: Any = mixer_of(model, 0).g_proj
    for head in range(4):
        for i in range(8):
            value = attention.v_proj.weight[(head // 2) * 8 + i]
            expected = (attention.o_proj.weight[:, head * 8 + i] + value) / 2
            assert torch.allclose(gate.weight[head * 8 + i], expected, atol=1e-7)


def test_convolutions_pass_their_input_on(build: Build, mixer: str) -> None:
    """Convolutions give the SiLU of their current input."""
    model = build(**GROUPED)
    replace_attention(model, [0], mixer)
    x = torch.randn(2, 9, 16)
    assert mixer_of(model, 0).k_conv1d(x).equal(torch.nn.functional.silu(x))


def test_gates_are_neutral(build: Build, mixer: str) -> None:
    """At every token alpha is 0.05, beta 0.95 (0.5 without a bias), and 693 tokens halve the memory."""
    model = build(**GROUPED)
    replace_attention(model, [0], mixer)
    new: Any = mixer_of(model, 0)
    x = 10 * torch.randn(2, 9, 32)
    assert torch.allclose((693 * log_decay(new, x)).exp(), torch.tensor(0.5), atol=1e-3)
    beta = 0.95 if mixer == "gka" else 0.5
    assert torch.allclose(new.b_proj(x).sigmoid(), torch.tensor(beta), atol=1e-3)
    if mixer == "gka":
        assert torch.allclose(new.alpha_proj(x).sigmoid(), torch.tensor(0.05), atol=1e-3)


def test_gates_begin_as_asked(build: Build) -> None:
    """Other starts are taken at their word, and refused out of range."""
    model, x = build(**GROUPED), torch.randn(1, 4, 32)
    replace_attention(model, [0], "gka", start=Start(alpha=0.5, beta=0.25, decay=0.125))
    new = mixer_of(model, 0)
    assert torch.allclose(new.alpha_proj(x).sigmoid(), torch.tensor(0.5), atol=1e-6)
    assert torch.allclose(new.b_proj(x).sigmoid(), torch.tensor(0.25), atol=1e-6)
    assert torch.allclose(log_decay(new, x), torch.tensor(-0.125), atol=1e-6)
    for wrong in ({"alpha": 0.0}, {"beta": 1.0}, {"decay": 0.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*expected"):
            Start(**wrong)


def test_first_forward_is_close_to_linear_attention(build: Build) -> None:
    """At the start the solve changes little: with none of it (`num_iter` = 0) outputs are nearly the same."""
    outputs = []
    for num_iter in (30, 0):
        model = build(**GROUPED)
        replace_attention(model, [0], "gka", {"num_iter": num_iter})
        torch.manual_seed(1)
        outputs.append(mixer_of(model, 0)(torch.randn(2, 40, 32))[0])
    difference = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert 0 < difference < 0.25


def test_hybrid_is_a_whole_model(build: Build, ids: Any, tmp_path: Path, mixer: str) -> None:
    """The changed model is saved, loaded and generates like any other."""
    model, tokens = build(**GROUPED), ids(2, 12)
    replace_attention(model, [1], mixer)
    model.save_pretrained(tmp_path)
    again = GKAForCausalLM.from_pretrained(tmp_path)
    assert again(tokens).logits.equal(model(tokens).logits)
    asked = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached, whole = (model.generate(tokens, use_cache=c, **asked) for c in (True, False))  # type: ignore[operator]
    assert cached.equal(whole)


def test_replaced_model_keeps_its_dtype_and_decay_in_float32(build: Build, mixer: str) -> None:
    """New mixers have the model's dtype, but for the decay's numbers, which stay float32."""
    model: Any = build(**GROUPED)
    model = model.to(torch.bfloat16)
    replace_attention(model, [0], mixer)
    types = {n: p.dtype for n, p in mixer_of(model, 0).named_parameters()}
    assert {n for n, dtype in types.items() if dtype == torch.float32} == {"A_log", "dt_bias"}


def test_recurrent_layers_that_are_there_stay(build: Build, ids: Any) -> None:
    """In a hybrid with other recurrent layers, of other sizes, those keep their sizes and weights."""
    fields = {
        "mixers": ["gla", "attention", "attention"],
        "num_kv_heads": 1,
        "attention_num_heads": 2,
    }
    model = build(**fields, attention_head_dim=16, attention_num_kv_heads=1)
    kept = copy.deepcopy(mixer_of(model, 0).state_dict())
    replace_attention(model, [2], "gka")
    assert model.config.pattern == ["gla", "attention", "gka"]
    again = GKAForCausalLM(model.config)
    again.load_state_dict(model.state_dict())
    assert again.eval()(ids(1, 9)).logits.equal(model(ids(1, 9)).logits)
    assert all(kept[k].equal(v) for k, v in mixer_of(model, 0).state_dict().items())


def test_more_layers_of_a_mixer_that_is_there(build: Build, ids: Any) -> None:
    """A hybrid of the same mixer, its head counts written otherwise, takes further layers of it."""
    model = build(mixers=["gka", "attention", "attention"])
    replace_attention(model, [1], "gka")
    assert model.config.pattern == ["gka", "gka", "attention"]
    assert model(ids(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("layers", "mixer", "options", "message"),
    [
        ([7], "gka", {}, "layer 7 lies outside the 3 layers"),
        ([-1], "gka", {}, "layer -1 lies outside"),
        ([0], "gka", {}, "layer 0 is 'gka', not attention; attention layers are 1, 2"),
        ([1, 1], "gka", {}, "expected one or more different layers"),
        ([], "gka", {}, "expected one or more different layers"),
        ([1], "rwkv", {}, "mixer is 'rwkv'; expected 'gka' or 'gated_deltanet'"),
        ([1], "gka", {"num_heads": 2}, "'num_heads' here .follows from the attention"),
        ([1], "gated_deltanet", {"num_iter": 2}, "'gated_deltanet' has no option 'num_iter'"),
        ([1], "gka", {"num_iter": 7}, "has 'gka' layers already, with num_iter = 6"),
    ],
)
def test_what_cannot_be_replaced_is_refused(
    build: Build, layers: list[int], mixer: str, options: dict[str, Any], message: str
) -> None:
    """Errors name the layer or option, and leave the model as it was."""
    model = build(mixers=["gka", "attention", "attention"])
    before, pattern = set(model.state_dict()), model.config.pattern
    with pytest.raises(InputError, match=message):
        replace_attention(model, layers, mixer, options)
    assert set(model.state_dict()) == before
    assert model.config.pattern == pattern


def test_models_without_attention_are_refused(build: Build) -> None:
    """Of a model without attention layers the error says what it has instead."""
    with pytest.raises(InputError, match="no attention layers to replace: its layers are gla"):
        replace_attention(build(mixer="gla"), [0])


def test_attention_with_short_convolutions_is_neither_replaced_nor_written_elsewhere(
    build: Build, tmp_path: Path
) -> None:
    """Both would lose its convolutions; a foreign format that has none says so."""
    short = {"attention": {"use_short_conv": True}}
    model = build(mixers=["attention", "attention"], mixer_overrides=short)
    with pytest.raises(InputError, match=r"layer 1 has short convolutions \(use_short_conv\)"):
        replace_attention(model, [1])
    with pytest.raises(InputError, match="qwen3 cannot express use_short_conv of 'attention'"):
        save_as(model, tmp_path / "there", "qwen3")
