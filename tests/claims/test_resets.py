"""Claim: a log decay whose exp is 0, -inf included, is a hard reset: the same as a call that starts there."""

import copy

import pytest
import torch
from torch import Tensor

from gka.layers import GatedDeltaNet, GatedKalmaNet, GatedLinearAttention
from gka.maths.moments import Decay, reset_floor
from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from gka.ops.delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from interpreted import problem as small_problem
from interpreted import results as interpreted_results
from problems import Problem, chunkwise, differentiate, make_problem
from tolerances import RELATIVE, assert_close

LOWEST = torch.finfo(torch.float32).min
RESETS = [-torch.inf, LOWEST, -1e18, -1e13, -1e6, -200.0]
PER_TOKEN = ("q", "k", "v", "g", "alpha", "beta")
GRADIENT = 20.0  # gradients sum over tokens


def reset_at(problem: Problem, places: list[int], value: float) -> Problem:
    assert problem.g is not None
    g = problem.g.clone()
    g[:, places] = value
    return Problem(**{**vars(problem), "g": g})


@pytest.mark.parametrize("value", RESETS)
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reset_is_a_start(dtype, op, solver, value):
    """Outputs, states and all gradients behind the reset are those of a call that begins there."""
    if dtype == torch.float64 and value == -200.0:
        value = -2000.0  # exp(-200) is a number in float64
    whole = reset_at(make_problem(100, dtype=dtype), [37], value)
    after = whole.tokens(37, None)
    after = Problem(**{**vars(after), "h0": None, "u0": None})
    options = {"op": op, "solver": solver, "backend": "torch"}
    (o, h, u), grads = differentiate(chunkwise, whole, **options)
    (o_after, h_after, u_after), grads_after = differentiate(chunkwise, after, **options)
    tolerance = RELATIVE[dtype] * (1.0 if solver == "chebyshev" else 1e3)
    tolerance = max(
        tolerance, 2e-3 if solver == "adaptive" else 0.0
    )  # its bound: chunks lie elsewhere
    assert_close(o[:, 37:], o_after, tolerance, "o")
    assert_close(h, h_after, RELATIVE[dtype], "h")
    assert_close(u, u_after, RELATIVE[dtype], "u")
    assert (grads["g"][:, 37] == 0).all(), "the reset's own gradient"
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
    del grads_after


@pytest.mark.parametrize("value", RESETS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_reset_gradients(backend, value):
    """Gradients of what lies behind the reset do not know what lay before it."""
    whole = reset_at(make_problem(100, dtype=torch.float32), [37], value)

    def gradients(problem: Problem, begin: int) -> dict[str, Tensor]:
        leaves = problem.leaves()
        o, *_ = chunkwise(leaves, backend=backend)
        o[:, begin:].square().sum().backward()
        return {name: x.grad for name, x in leaves.tensors().items() if x.grad is not None}

    after = whole.tokens(37, None)
    after = Problem(**{**vars(after), "h0": None, "u0": None})
    alone, found = gradients(after, 0), gradients(whole, 37)
    for name in PER_TOKEN:
        assert_close(found[name][:, 37:], alone[name], GRADIENT * RELATIVE[torch.float32], name)
        assert (found[name][:, :37] == 0).all(), f"d{name} before the reset"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_resets_in_a_chunk(dtype):
    """Sixty resets in a chunk cost the decays behind them no digit: the sum restarts at each."""
    whole = reset_at(make_problem(70, dtype=dtype), list(range(2, 62)), -torch.inf)
    o, h, u = chunkwise(whole, backend="torch")
    alone = whole.tokens(61, None)
    alone = Problem(**{**vars(alone), "h0": None, "u0": None})
    o_alone, h_alone, u_alone = chunkwise(alone, backend="torch")
    assert_close(o[:, 61:], o_alone, RELATIVE[dtype], "o")
    assert_close(h, h_alone, RELATIVE[dtype], "h")
    assert_close(u, u_alone, RELATIVE[dtype], "u")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floor_is_a_reset(dtype):
    """The number that stands for all lower log decays is a decay of 0 in its precision."""
    assert torch.tensor(reset_floor(dtype), dtype=dtype).exp() == 0
    decay = Decay.of(
        torch.tensor([[[-0.5, LOWEST, -0.25, -0.125]]]), torch.zeros(1, 1, 4, 1).to(dtype)
    )
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, -0.25, 1, 0], [0, -0.375, -0.125, 1]])
    expected = torch.where(expected < 0, expected.double().exp(), expected.double()).to(dtype)
    assert_close(decay.mask[0, 0], expected, RELATIVE[dtype], "mask")


@pytest.mark.parametrize("value", [-torch.inf, LOWEST, -1e18])
@pytest.mark.parametrize(
    "op", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, chunk_simple_gla]
)
def test_other_memories_reset(op, value):
    """Delta rule and gated linear attention, outputs, states and gradients, each form."""
    base = reset_at(make_problem(90, dtype=torch.float32), [40], value)
    inputs = {name: getattr(base, name) for name in ("q", "k", "v", "g", "beta")}

    def run(begin: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaves = {n: x[:, begin:].clone().requires_grad_() for n, x in inputs.items()}
        o, state = op(**leaves, output_final_state=True)
        (o[:, 40 - begin :].square().sum() + state.square().sum()).backward()
        return o[:, 40 - begin :], state, {n: x.grad[:, 40 - begin :] for n, x in leaves.items()}

    (o, state, grads), (o_alone, state_alone, alone) = run(0), run(40)
    assert_close(o, o_alone, RELATIVE[torch.float32], "o")
    assert_close(state, state_alone, RELATIVE[torch.float32], "state")
    for name, grad in grads.items():
        assert_close(grad, alone[name], GRADIENT * RELATIVE[torch.float32], name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("value", [-torch.inf, LOWEST, -1e18])
def test_triton_kernels_reset(value, tied):
    """The Triton kernels, interpreted or on a GPU: output, states, gradients as float64's token by token."""
    inputs = small_problem(tied=tied, length=40)
    for name in ("g",) if tied else ("g", "gk"):
        inputs[name][:, [5, 6, 17, 30]] = value
    expected = interpreted_results(inputs, "torch", torch.float64, "cpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = interpreted_results(inputs, "triton", torch.float32, device)
    for name, x in expected.items():
        assert_close(found[name].cpu().double(), x, 1e-3, name)


@pytest.mark.parametrize("start", [89.0, 1e4, torch.inf])
def test_layer_of_any_rate(start):
    """A_log of 89 and more forgets at every token; outputs and gradients stay finite."""
    torch.manual_seed(0)
    layer = GatedKalmaNet(hidden_size=32, head_dim=16, num_heads=2)
    with torch.no_grad():
        layer.A_log.fill_(start)
        layer.dt_bias[0] = -200.0  # softplus of it is 0
    x = torch.randn(1, 20, 32, requires_grad=True)
    y = layer(x)[0]
    y.sum().backward()
    assert torch.isfinite(y).all()
    for name, grad in [("x", x.grad), *((n, p.grad) for n, p in layer.named_parameters())]:
        assert torch.isfinite(grad).all(), name  # pyright: ignore


@pytest.mark.parametrize("rate", [61.0, 88.5, 103.0])
@pytest.mark.parametrize("make", [GatedKalmaNet, GatedLinearAttention, GatedDeltaNet])
def test_layer_decays_where_the_rate_is_out_of_range(make, rate):
    """exp(A_log) softplus(x) is of ordinary size for x near -A_log, though float32 may hold neither factor:
    outputs and gradients are float64's."""
    torch.manual_seed(0)
    layer = make(hidden_size=32, head_dim=16, num_heads=2)
    with torch.no_grad():
        layer.A_log.fill_(rate)
        layer.dt_bias.copy_(torch.tensor([0.5, -2.0]) - rate)
        layer.a_proj.weight.mul_(2.0)
    x = torch.randn(1, 20, 32)
    wide = copy.deepcopy(layer).double()
    results = [_with_gradients(layer, x), _with_gradients(wide, x.double())]
    assert results[1]["A_log"].abs().min() > 1e-3
    for name, expected in results[1].items():
        assert_close(results[0][name].double(), expected, 1e-4, name)


def _with_gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)[0]
    named = {"x": x, **dict(layer.named_parameters())}
    weights = torch.arange(y.numel()).view_as(y).to(y.dtype).cos()
    grads = torch.autograd.grad((y * weights).sum(), list(named.values()))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}
