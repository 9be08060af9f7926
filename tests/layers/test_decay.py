"""A_log and dt_bias stay float32, and out of weight decay, whatever is done to the model around them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gka.layers import (
    DECAY_PARAMETERS,
    MIXERS,
    build_mixer,
    decayed_parameters,
    mixer_options,
    parameter_groups,
)

DECAYING = ["gka", "gla", "gated_deltanet"]


def mixer(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "head_dim": 8, "num_heads": 2}
    return build_mixer(
        name, **{k: v for k, v in sizes.items() if k in mixer_options(name)}, **options
    )


def test_these_are_all_mixers_with_a_decay():
    """No other mixer holds a decay parameter."""
    found = [name for name in MIXERS if hasattr(mixer(name), "A_log")]
    assert sorted(found) == sorted(DECAYING)


CASTS: dict[str, tuple[Callable[[nn.Module], Any], torch.dtype]] = {
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to float16 with a device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "float8": (lambda m: m.to(torch.float8_e4m3fn), torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_reduces_them(name: str, cast: str):
    """Every cast of a model to 16 or 8 bits leaves them, and their gradients, the same float32 bits."""
    module = nn.Sequential(mixer(name))
    held = {n: p for n, p in module.named_parameters() if n.endswith(DECAY_PARAMETERS)}
    before = {n: p.detach().clone() for n, p in held.items()}
    for parameter in held.values():
        parameter.grad = torch.full_like(parameter, 1 / 3)
    change, dtype = CASTS[cast]
    change(module)
    for n, p in module.named_parameters():
        if n in before:
            assert p.dtype == torch.float32 and p.equal(before[n]), n
            assert p.grad is not None and p.grad.equal(torch.full_like(before[n], 1 / 3)), n
        else:
            assert p.dtype == dtype, n
    assert list(module.state_dict()) == list(nn.Sequential(mixer(name)).state_dict())


def test_they_widen_with_the_model():
    """float64 reaches them, and from there 16 bits bring them to float32."""
    layer = mixer("gka").double()
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float64
    assert layer.bfloat16().A_log.dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_a_default_dtype_does_not_reduce_them(default: torch.dtype):
    """A model constructed under a default dtype of 16 bits, as loaders do, has them in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        layer = mixer("gka")
    finally:
        torch.set_default_dtype(before)
    assert layer.q_proj.weight.dtype == default
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.promote_types(default, torch.float32)
    assert layer.A_log.isfinite().all()


def test_a_reduced_model_still_runs():
    """In bfloat16 the layer takes and gives bfloat16, and float32 gradients reach the decay."""
    layer = mixer("gka").bfloat16()
    out, _, _ = layer(torch.randn(1, 9, 16, dtype=torch.bfloat16))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.A_log.grad.dtype == torch.float32 and layer.A_log.grad.isfinite().all()


def marked(module: nn.Module) -> set[str]:
    return {n for n, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}


def assigned(module: nn.Module) -> nn.Module:
    stored = {n: p.to(torch.bfloat16) for n, p in module.state_dict().items()}
    module.load_state_dict(stored, assign=True)
    return module


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as constructed": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "cast": lambda m: m.bfloat16(),
    "assign": assigned,
}


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("change", CHANGES)
def test_marks_and_width_survive(name: str, change: str):
    """Copies, pickles, to_empty, casts and assigned checkpoints keep the marks and the float32."""
    module = CHANGES[change](nn.Sequential(mixer(name)))
    assert marked(module) == {"0.A_log", "0.dt_bias"}
    for parameter in (module[0].A_log, module[0].dt_bias):  # pyright: ignore[reportIndexIssue]
        assert isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32


@pytest.mark.parametrize("change", CHANGES)
def test_groups_go_by_names(change: str):
    """The optimizer's groups hold every parameter once, the decay parameters without weight decay."""
    module = CHANGES[change](nn.Sequential(mixer("gka")))
    names = decayed_parameters(module)
    assert "0.q_proj.weight" in names and "0.q_conv1d.weight" in names
    assert not [n for n in names if n.endswith((*DECAY_PARAMETERS, "bias", "o_norm.weight"))]
    decayed, rest = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    grouped = [*decayed["params"], *rest["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in module.parameters()}
    assert len(grouped) == len(list(module.parameters()))
    module[0].q_proj.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    assert len(parameter_groups(module, 0.1)[0]["params"]) == len(decayed["params"]) - 1
