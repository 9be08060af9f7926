"""On a GPU: the kernels of installed libraries against the torch form in float64, on rounded inputs."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gka.layers import GatedDeltaNet
from gka.ops import chunk_simple_gla, last_backend, why_not_external
from gka.ops.delta_rule import chunk_gated_delta_rule
from gka.ops.external import EXTERNAL, Rule
from tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.gpu

# the libraries round what chunks hand on to 16 bits
TOLERANCE = RELATIVE[torch.bfloat16]
PAIRS = [(name, rule) for name, x in EXTERNAL.items() for rule in get_args(Rule) if rule in x.rules]


def draw(length: int, heads: int, dim: int, batch: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = (batch, length, heads, dim)
    q, k = (torch.nn.functional.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    g, beta = torch.rand(2, *shape[:3])
    heads_of = {"q": q, "k": k, "v": torch.randn(shape)}
    named = {name: x.to("cuda", torch.bfloat16) for name, x in heads_of.items()}
    return named | {"g": -(10.0 ** (-3 + 2 * g)).cuda(), "beta": beta.cuda()}


def outcome(
    rule: str, inputs: dict[str, Tensor], backend: str, **options: Any
) -> dict[str, Tensor]:
    """o, the final states, and the gradients of all inputs and of the initial states."""
    x = {name: y.clone().requires_grad_() for name, y in inputs.items()}
    if (state := options.pop("initial_state", None)) is not None:
        options["initial_state"] = x["state"] = state.clone().requires_grad_()
    options |= {"backend": backend, "output_final_state": True}
    o: Tensor
    final: Any
    if rule == "simple_gla":
        o, final = chunk_simple_gla(x["q"], x["k"], x["v"], x["g"], **options)
    else:
        g = None if rule == "delta_rule" else x["g"]
        o, final = chunk_gated_delta_rule(x["q"], x["k"], x["v"], g, x["beta"], **options)
    assert last_backend() == backend
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in (o, final)]
    grads = torch.autograd.grad((o, final), list(x.values()), weights, allow_unused=True)
    return {"o": o, "final": final} | {
        f"d{n}": y for n, y in zip(x, grads, strict=True) if y is not None
    }


def check(name: str, rule: Rule, inputs: dict[str, Tensor], **options: Any) -> None:
    dims = (inputs["q"].shape[-1], inputs["v"].shape[-1])
    if reason := why_not_external(name, rule, dims=dims):
        pytest.skip(f"{name}: {reason}")
    found = outcome(rule, inputs, name, **options)
    wide = {n: x.double() for n, x in inputs.items()}
    if (state := options.get("initial_state")) is not None:
        options["initial_state"] = state.double()
    expected = outcome(rule, wide, "torch", **options)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, TOLERANCE, f"{name} {rule} {key}")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name, rule", PAIRS)
def test_forward_and_gradients(name, rule, dim):
    """Outputs, final states and every gradient, for a length that fills no whole chunk, and two sequences."""
    check(name, rule, draw(300, 4, dim, batch=2))


@pytest.mark.parametrize("name, rule", PAIRS)
def test_packed_sequences_with_states(name, rule):
    """Sequences packed into one row, an empty one among them, each with a state of its own."""
    state = torch.randn(4, 2, 128, 128, device="cuda")
    bounds = torch.tensor([0, 65, 65, 250, 300], device="cuda")
    check(name, rule, draw(300, 2, 128), initial_state=state, cu_seqlens=bounds)


def test_a_long_sequence_of_few_heads():
    """flash-qla splits a long sequence of few heads over the card, and gives the same results."""
    check("flash_qla", "gated_delta_rule", draw(4096, 2, 128))


@pytest.mark.parametrize("length", [300, 4096])
def test_a_compiled_layer(length):
    """A layer's memory on flash-qla compiles without a break; output and gradients are the eager ones."""
    if reason := why_not_external("flash_qla", "gated_delta_rule"):
        pytest.skip(reason)
    torch.manual_seed(0)
    layer = GatedDeltaNet(256, head_dim=128, num_heads=2, backend="flash_qla")
    layer = layer.to("cuda", torch.bfloat16)
    layer = layer.to("cuda", torch.bfloat16)
    x = torch.randn(1, length, 256, device="cuda", dtype=torch.bfloat16)
    outcomes = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        y = call(x)[0]
        grads = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
        outcomes.append([y, *grads])
    assert last_backend() == "flash_qla"
    for mine, theirs in zip(*outcomes, strict=True):
        assert_close(mine, theirs, TOLERANCE)
