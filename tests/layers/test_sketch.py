"""A GKA layer that solves in d of K dimensions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.errors import InputError
from gka.layers import GatedKalmaNet, StateCache, decayed_parameters, parameter_groups
from gka.layers.parts.sketch import Sketch
from gka.maths.sketch import orthonormal
from tolerances import RELATIVE, assert_close

EXACT = 1e-9
LAYERS: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_kv_heads": 2},
    "no alpha": {"use_alpha_connection": False},
    "value heads": {"num_kv_heads": None, "num_v_heads": 8},
    "expanded heads, fixed": {"num_kv_heads": 2, "kv_rank": 3, "sketch": "fixed"},
}


QUICK = ("no alpha", "expanded heads, fixed")
CASES = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in LAYERS]


@pytest.fixture(params=CASES)
def layer(request: Any, make: Callable[..., Any]) -> GatedKalmaNet:
    return make("gka", **{"sketch_dim": 3, **LAYERS[request.param]})


def test_cached_calls_go_on(layer: GatedKalmaNet, tokens: Callable[..., Tensor]) -> None:
    """A prompt and single tokens from its cache equal the whole row; the cache holds what `state_shapes`
    tells, without U of whole keys where there is no alpha."""
    x, cache = tokens(2, 30), StateCache()
    whole = layer(x)[0]
    with torch.no_grad():
        parts = [layer(part, past_key_values=cache)[0] for part in x.split([21, *[1] * 9], 1)]
    assert_close(torch.cat(parts, 1), whole, EXACT)
    held = cache.layers[0].recurrent_states
    assert [tuple(held[n].shape[1:]) for n in sorted(held)] == layer.state_shapes
    assert len(held) == (3 if layer.use_alpha_connection else 2)


def test_packed_and_padded_rows_are_rows_alone(
    layer: GatedKalmaNet, tokens: Callable[..., Tensor]
) -> None:
    """Sequences packed into one row, and a row padded on the left."""
    x = tokens(1, 24)
    parts = torch.cat([layer(x[:, :9])[0], layer(x[:, 9:])[0]], 1)
    assert_close(layer(x, cu_seqlens=torch.tensor([0, 9, 24]))[0], parts, EXACT)
    mask = torch.ones(1, 24).long()
    mask[:, :5] = 0
    assert_close(layer(x, attention_mask=mask)[0][:, 5:], layer(x[:, 5:])[0], EXACT)


def test_all_dimensions_are_the_plain_layer(make: Callable[..., Any], tokens: Any) -> None:
    """d = K: the same function as without a sketch, to rounding, for any learned weight."""
    sketched, plain = make("gka", sketch_dim=6), make("gka")
    sketched.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(sketched.sketch_map.weight)
    assert_close(sketched(tokens(2, 20))[0], plain(tokens(2, 20))[0], 1e-8)


def test_a_learned_map_stays_orthonormal_and_learns(
    make: Callable[..., Any], tokens: Callable[..., Tensor]
) -> None:
    """Large steps and weight decay leave S^T S = I, and turn the span."""
    layer = make("gka", sketch_dim=2, sketch="learned")
    before = layer.sketch_map().detach()
    assert "sketch_map.weight" in decayed_parameters(layer)
    optimizer = torch.optim.AdamW(parameter_groups(layer, 0.5), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(tokens(2, 20))[0].square().sum().backward()
        optimizer.step()
    s = layer.sketch_map()
    assert_close(
        s.mT @ s, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), RELATIVE[torch.float64]
    )
    assert (s @ s.mT - before @ before.mT).norm() > 0.1


def test_a_fixed_map_is_not_trained(make: Callable[..., Any], tokens: Any) -> None:
    """It has no gradient, even if all parameters are set to require one, and no optimizer's group has it."""
    layer = make("gka", sketch_dim=2, sketch="fixed")
    groups = parameter_groups(layer, 0.1)
    assert all(layer.sketch_map.weight is not p for group in groups for p in group["params"])
    layer.requires_grad_(True)
    layer(tokens(1, 9))[0].sum().backward()
    assert layer.sketch_map.weight.grad is None and layer.q_proj.weight.grad is not None
    layer.sketch_map.weight = torch.nn.Parameter(layer.sketch_map.weight.detach().clone())
    assert not layer.sketch_map.weight.requires_grad


def test_a_basis_is_loaded_by_its_span() -> None:
    """Whatever the scale and angles of its columns; other shapes and dependent columns are refused."""
    sketch = Sketch(2, 5, 2, "fixed")
    basis = torch.randn(2, 5, 2)
    sketch.load(3 * basis)
    wanted = orthonormal(basis)
    assert_close(sketch() @ sketch().mT, wanted @ wanted.mT, RELATIVE[torch.float32])
    with pytest.raises(InputError, match=r"\[Hk, K, d\] = \[2, 5, 2\]"):
        sketch.load(basis[:1])
    with pytest.raises(InputError, match="independent columns"):
        sketch.load(torch.ones(2, 5, 2))


def test_autocast_and_half_precision(make: Callable[..., Any], tokens: Any) -> None:
    """Under bfloat16 autocast S is made in float32; a bfloat16 layer runs."""
    layer, x = make("gka", sketch_dim=3).float(), tokens(2, 20).float()
    plain = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        s, found = layer.sketch_map(), layer(x)[0]
    assert_close(s.mT @ s, torch.eye(3).expand(2, 3, 3), RELATIVE[torch.float32])
    assert found.dtype == torch.bfloat16
    assert_close(found, plain, 5e-2)
    assert_close(layer.bfloat16()(x.bfloat16())[0], plain, 1e-1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sketch_dim": 7}, "sketch_dim: expected None or an int from 1 to head_dim = 6, got 7"),
        ({"sketch_dim": True}, "sketch_dim: expected"),
        (
            {"sketch_dim": 2, "sketch": "random"},
            "sketch: expected one of learned, fixed, got 'random'",
        ),
    ],
)
def test_wrong_options(make: Callable[..., Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make("gka", **options)
