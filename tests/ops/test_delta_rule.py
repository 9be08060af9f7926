"""The delta rule's public calls: defaults, dtypes, states, and what they refuse."""

import pytest
import torch
from torch import Tensor

from gka.ops.delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from tolerances import RELATIVE, assert_close

OPS = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


def draw(length: int = 70, heads: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, length, heads, 8, dtype=torch.float64)
    g, beta = torch.rand(2, 2, length, heads, dtype=torch.float64)
    k = torch.nn.functional.normalize(k, dim=-1)
    return {"q": q, "k": k, "v": v, "g": -0.2 * g, "beta": beta}


@pytest.mark.parametrize("op", OPS)
def test_defaults(op):
    """No g is no decay, no beta is 1, no scale is K^-1/2, no initial state is zero, and no final state
    is returned unasked."""
    inputs = draw()
    q, k, v = (inputs[name] for name in "qkv")
    given = {"g": torch.zeros_like(inputs["g"]), "beta": torch.ones_like(inputs["beta"])}
    zero = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    o, state = op(q, k, v)
    full, final = op(q, k, v, **given, scale=8**-0.5, initial_state=zero, output_final_state=True)
    assert_close(o, full, RELATIVE[torch.float64])
    assert state is None and final.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("op", OPS)
def test_more_value_heads_than_query_heads(op):
    """FLA's grouped values: gates have as many heads as values, queries and keys are shared."""
    inputs = draw()
    q, k = (inputs[name][:, :, :2] for name in "qk")
    got, _ = op(q, k, inputs["v"], inputs["g"], inputs["beta"])
    full = {name: inputs[name][:, :, :2].repeat_interleave(2, 2) for name in "qk"}
    expected, _ = op(**{**inputs, **full})
    assert_close(got, expected, RELATIVE[torch.float64])


def test_the_two_ops_agree_on_packed_sequences():
    """Token by token equals chunks for packed sequences with initial and final states."""
    inputs = {name: x[:1] for name, x in draw().items()}
    q, k, v, g, beta = inputs.values()
    state = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 3, 3, 68, 70])
    outputs = [op(q, k, v, g, beta, None, state, True, cu_seqlens) for op in OPS]
    for mine, theirs in zip(*outputs, strict=True):
        assert_close(mine, theirs, RELATIVE[torch.float64])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(op, dtype):
    """Narrow inputs are accumulated in float32: states are float32, and the output, in q's dtype, is
    that of float64 arithmetic up to its own rounding."""
    inputs = {name: x.to(dtype) for name, x in draw().items()}
    o, state = op(**inputs, output_final_state=True)
    expected, final = op(
        **{name: x.double() for name, x in inputs.items()}, output_final_state=True
    )
    assert o.dtype == dtype and state.dtype == torch.float32
    assert_close(state, final, RELATIVE[torch.float32])
    assert_close(o, expected, 2 * max(torch.finfo(dtype).eps, 1e-6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(**inputs)[0], o)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 70, 3, 8)}, "q's 4 heads must be a multiple of k's; got 3"),
        ({"v": torch.zeros(2, 70, 4)}, "v must have 4 dimensions"),
        ({"k": torch.zeros(2, 70, 4, 7)}, "k must have q's head dimension 8"),
        ({"g": torch.zeros(2, 70, 1)}, r"g must have shape \[B, T, H\]"),
        ({"beta": torch.zeros(2, 69, 4)}, r"beta must have shape \[B, T, H\]"),
        (
            {"initial_state": torch.zeros(1, 4, 8, 8)},
            r"initial_state must have shape \[2, 4, 8, 8\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 70])}, "B = 1; got B = 2"),
    ],
)
def test_refusals(op, change, message):
    """Inputs that do not fit are refused by a message that names them."""
    inputs = {
        **draw(),
        **{name: x if name == "cu_seqlens" else x.double() for name, x in change.items()},
    }
    with pytest.raises(ValueError, match=message):
        op(**inputs)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [-10.0, -20.0, -40.0])
def test_the_gradient_of_a_strong_decay_is_no_difference(decay, dtype, op):
    """The gradient of g is as many times smaller than the others as the decay says, and right to rounding all
    the same: it holds no difference of larger sums."""
    inputs = {name: x.to(dtype) for name, x in draw(length=20).items()}
    inputs["g"] = torch.full_like(inputs["g"], decay)

    def gradient(op, inputs: dict[str, Tensor]) -> Tensor:
        g = inputs["g"].detach().requires_grad_()
        o, state = op(**{**inputs, "g": g}, output_final_state=True)
        return torch.autograd.grad(o.sum() + state.sum(), g)[0]

    exact = {name: x.double() for name, x in inputs.items()}
    expected = gradient(fused_recurrent_gated_delta_rule, exact)
    assert 0 < expected.abs().max() < 100 * torch.tensor(decay).exp()
    assert_close(gradient(op, inputs), expected, RELATIVE[dtype], "dg")


@pytest.mark.parametrize("op", OPS)
def test_unsorted_bounds_are_refused(op):
    """cu_seqlens that fall, or that do not end at T, are refused."""
    inputs = {name: x[:1] for name, x in draw().items()}
    with pytest.raises(ValueError, match="must not decrease"):
        op(**inputs, cu_seqlens=torch.tensor([0, 40, 30, 70]))
    with pytest.raises(ValueError, match="end with T = 70"):
        op(**inputs, cu_seqlens=torch.tensor([0, 40]))
