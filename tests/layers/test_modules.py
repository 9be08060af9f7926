"""Norms, the short convolution, and the decay with what weight decay leaves out."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gka.layers import (
    DECAY_PARAMETERS,
    MIXERS,
    GatedRMSNorm,
    RMSNorm,
    ShortConvolution,
    build_mixer,
    decayed_parameters,
    mixer_options,
    parameter_groups,
)
from gka.layers.parts.modules import unit
from tolerances import RELATIVE, assert_close


def norm_of(kind: type[RMSNorm]) -> RMSNorm:
    norm = kind(16, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    return norm.double()


def formula(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def test_rms_norm():
    """weight * x / sqrt(mean(x^2) + eps)."""
    torch.manual_seed(0)
    norm, x = norm_of(RMSNorm), torch.randn(3, 5, 16, dtype=torch.float64)
    assert_close(norm(x), formula(norm, x), 1e-14)


def test_gated_rms_norm():
    """The norm comes first, then SiLU of the gate multiplies it."""
    torch.manual_seed(0)
    norm, x, gate = norm_of(GatedRMSNorm), *torch.randn(2, 3, 5, 16, dtype=torch.float64)
    assert_close(norm(x, gate), formula(norm, x) * gate * torch.sigmoid(gate), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    """Only the result is rounded: squares that overflow float16 do no harm, and equality with float32
    arithmetic is exact."""
    norm = RMSNorm(16).to(dtype)
    x = torch.linspace(-3e4, 3e4, 16).to(dtype)
    output = norm(x)
    assert output.dtype == dtype
    assert torch.equal(output, RMSNorm(16)(x.float()).to(dtype))
    assert torch.equal(unit(x), unit(x.float()).to(dtype))


def test_unit():
    """x / (|x| + 1e-6); a zero vector stays zero and has a finite gradient."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = unit(x)
    assert_close(y, x / (5 + 1e-6), 1e-14)
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


EXACT = 1e-12


def definition(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = SiLU(sum_i weight[:, i] x_{t-W+1+i}), one token at a time."""
    width = weight.shape[-1]
    rows = []
    for t in range(x.shape[1]):
        seen = range(max(t - width + 1, 0), t + 1)
        y = torch.stack([weight[:, 0, width - 1 - (t - s)] * x[:, s] for s in seen]).sum(0)
        rows.append(y * torch.sigmoid(y))
    return torch.stack(rows, 1)


def convolution_of(width: int) -> tuple[ShortConvolution, Tensor]:
    torch.manual_seed(width)
    return ShortConvolution(5, width).double(), torch.randn(2, 12, 5, dtype=torch.float64)


@pytest.mark.parametrize("width", range(1, 9))
def test_definition(width):
    """Outputs and gradients are those of the definition, for widths 1 to 8."""
    convolution, x = convolution_of(width)
    x.requires_grad_()
    output, expected = convolution(x), definition(x, convolution.weight)
    assert_close(output, expected, EXACT)
    inputs = [x, convolution.weight]
    for got, grad in zip(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert_close(got, grad, EXACT)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_state_carries_the_past(width):
    """Cut anywhere, the second part goes on from the first one's state, itself part of the definition:
    the last inputs, zeros before the first."""
    convolution, x = convolution_of(width)
    whole = convolution(x)
    for cut in (1, 3, 11):
        state = convolution.next_state(x[:, :cut], None)
        padded = torch.cat([x.new_zeros(2, width, 5), x[:, :cut]], 1)
        assert torch.equal(state, padded[:, -width:].mT)
        assert_close(convolution(x[:, cut:], state), whole[:, cut:], EXACT)
        later = convolution.next_state(x[:, cut:], state)
        assert torch.equal(later, convolution.next_state(x, None))


def test_state_of_rows_that_end_early():
    """With lengths, a row's state is that after its own last input, from a past or without one."""
    convolution, x = convolution_of(4)
    before = convolution.next_state(torch.randn(2, 6, 5, dtype=torch.float64), None)
    for state in (None, before):
        got = convolution.next_state(x, state, torch.tensor([0, 7]))
        none = x.new_zeros(1, 5, 4) if state is None else state[:1]
        assert torch.equal(got[:1], none)
        past = None if state is None else state[1:]
        assert torch.equal(got[1:], convolution.next_state(x[1:, :7], past))


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("bounds", [[0, 12], [0, 1, 2, 12], [0, 0, 5, 5, 12, 12]])
def test_packed_sequences_do_not_leak(width, bounds):
    """Packed sequences, empty ones among them, are convolved apart even from infinite neighbours."""
    convolution, x = convolution_of(width)
    x = x[:1]
    cu_seqlens = torch.tensor(bounds)
    parts = [convolution(x[:, a:b]) for a, b in itertools.pairwise(bounds) if a < b]
    assert_close(convolution(x, cu_seqlens=cu_seqlens), torch.cat(parts, 1), EXACT)
    last = bounds[-2] if bounds[-2] < 12 else 5
    poisoned = x.clone()
    poisoned[:, :last] = torch.inf
    got = convolution(poisoned, cu_seqlens=cu_seqlens)[:, last:]
    assert_close(got, convolution(x[:, last:]), EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    """Narrow dtypes keep their dtype and the accuracy of one rounding."""
    convolution, x = convolution_of(4)
    narrow = ShortConvolution(5, 4).to(dtype)
    narrow.load_state_dict({"weight": convolution.weight.detach().to(dtype)})
    output = narrow(x.to(dtype))
    assert output.dtype == dtype
    assert_close(output, convolution(x), RELATIVE[dtype])


def test_released_shape_and_bad_width():
    """The weight is [channels,1,width] without a bias; a width below 1 is refused."""
    assert {k: tuple(v.shape) for k, v in ShortConvolution(6, 4).state_dict().items()} == {
        "weight": (6, 1, 4)
    }
    with pytest.raises(ValueError, match="conv_size"):
        ShortConvolution(6, 0)


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
