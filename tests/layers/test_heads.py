"""Key and value heads counted apart, and expanded by learned maps."""

import pytest
import torch
import torch.nn.functional as F

from gka.layers import GatedKalmaNet, StateCache
from gka.layers.parts.heads import HeadExpansion
from tolerances import assert_close

EXACT = 1e-9
SIZES = {"hidden_size": 24, "num_heads": 4, "head_dim": 6}


def make(**options) -> GatedKalmaNet:
    torch.manual_seed(0)
    return GatedKalmaNet(**{**SIZES, **options}).double()


@pytest.mark.parametrize("mix", [False, True])
def test_at_the_start_it_repeats(mix, tokens):
    """A new expansion repeats each head for its group of query heads: the layer is the grouped one."""
    grouped, expanded = make(num_kv_heads=2), make(num_kv_heads=2, kv_rank=3, kv_mix=mix)
    expanded.load_state_dict(grouped.state_dict(), strict=False)
    assert_close(expanded(tokens(2, 20))[0], grouped(tokens(2, 20))[0], EXACT)


@pytest.mark.parametrize("mix", [False, True])
def test_expansion_is_the_formula(mix):
    """y = up SiLU(down x) + M x with M the repetition or the learned matrix, head by head."""
    torch.manual_seed(0)
    layer = HeadExpansion(2, 6, 5, 3, mix).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    matrix = layer.mix if mix else torch.eye(2, dtype=x.dtype).repeat_interleave(3, 0)
    heads = [
        torch.stack([matrix[h, i] * x[..., 5 * i : 5 * i + 5] for i in range(2)]).sum(0)
        for h in range(6)
    ]
    residual = torch.cat(heads, -1)
    expected = F.silu(x @ layer.down.weight.T) @ layer.up.weight.T + residual
    assert_close(layer(x), expected, EXACT)


@pytest.mark.parametrize("mix", [False, True])
def test_every_parameter_learns(mix, tokens):
    """Gradients reach both maps and the matrix of keys and of values."""
    layer = make(num_kv_heads=2, kv_rank=3, kv_mix=mix)
    with torch.no_grad():
        for parameter in (layer.k_expand.up.weight, layer.v_expand.up.weight):
            parameter.normal_(0, 0.1)
    layer(tokens(2, 20))[0].square().sum().backward()
    names = {
        n
        for n, p in layer.named_parameters()
        if "_expand" in n and p.grad is not None and p.grad.any()
    }
    assert len(names) == (6 if mix else 4)


def test_decoding_with_expansion(tokens):
    """Token by token from a cache, padded on the left or not, equals one call."""
    layer, x = make(num_kv_heads=2, kv_rank=3, kv_mix=True, layer_idx=0), tokens(2, 20)
    torch.nn.init.normal_(layer.k_expand.up.weight)
    torch.nn.init.normal_(layer.v_expand.up.weight)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    cache = StateCache()
    with torch.no_grad():
        expected = layer(x, attention_mask=mask)[0]
        parts = [layer(x[:, :12], attention_mask=mask[:, :12], past_key_values=cache)[0]]
        parts += [
            layer(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)[0]
            for t in range(12, 20)
        ]
        alone = layer(x[1:, 5:])[0]
    assert_close(torch.cat(parts, 1), expected, EXACT)
    assert_close(expected[1:, 5:], alone, EXACT)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (4, 2), (8, 4), (2, 8)])
def test_key_and_value_heads_counted_apart(counts, tokens):
    """Any counts that divide the greatest equal a layer in which all heads are written out."""
    k, v = counts
    layer = make(num_k_heads=k, num_v_heads=v)
    heads = max(4, k, v)
    full = make(num_heads=heads)
    state = layer.state_dict()
    for name, count in (("q", 4), ("k", k), ("v", v)):
        for key in (f"{name}_proj.weight", f"{name}_conv1d.weight"):
            state[key] = state[key].unflatten(0, (count, 6)).repeat_interleave(heads // count, 0)
            state[key] = state[key].flatten(0, 1)
    full.load_state_dict(state)
    assert_close(layer(tokens(2, 20))[0], full(tokens(2, 20))[0], EXACT)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_rank": 3}, "4 key or value heads must be fewer than"),
        ({"kv_mix": True}, "kv_mix is a part of the learned expansion: it needs kv_rank"),
        ({"num_kv_heads": 2, "kv_rank": 0}, "kv_rank must be a positive integer, got 0"),
        ({"num_k_heads": 3}, "num_k_heads = 3, num_v_heads = 3 must divide 4"),
        ({"num_k_heads": 2, "num_kv_heads": 2}, "both count key heads"),
    ],
)
def test_counts_that_do_not_fit(options, message):
    """Expansions without anything to expand, and counts that do not divide, are refused."""
    with pytest.raises(ValueError, match=message):
        make(**options)
