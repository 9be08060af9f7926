"""SoftmaxAttention and SlidingWindowAttention against the formula, and rotary positions."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gka.layers import SlidingWindowAttention, SoftmaxAttention, StateCache, rotate
from gka.models import GKAConfig, GKAForCausalLM
from tolerances import assert_close

EXACT = 1e-12


def definition(layer: SoftmaxAttention, x: Tensor, window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what each token sees, one query head at a time."""
    length, dim = x.shape[1], layer.head_dim
    group = layer.num_heads // layer.num_kv_heads
    positions = torch.arange(length)[None]
    q, k, v = (p(x).unflatten(-1, (-1, dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q = rotate(layer.q_norm(q), positions, layer.rope_theta)
    k = rotate(layer.k_norm(k), positions, layer.rope_theta)
    age = positions[0][:, None] - positions[0]
    hidden = (age < 0) | (age >= (window or length))
    heads = []
    for h in range(layer.num_heads):
        scores = q[:, :, h] @ k[:, :, h // group].mT / math.sqrt(dim)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        heads.append(weights @ v[:, :, h // group])
    return layer.o_proj(torch.cat(heads, -1))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, None), (4, 2), (4, 1)])
def test_softmax_attention(heads, kv_heads, qk_norm):
    """Attention is the formula, with and without grouped heads and norms."""
    torch.manual_seed(0)
    layer = SoftmaxAttention(24, heads, kv_heads, 6, qk_norm=qk_norm, rope_theta=100.0).double()
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    assert_close(layer(x)[0], definition(layer, x, None), EXACT)
    assert ("q_norm.weight" in layer.state_dict()) is qk_norm


@pytest.mark.parametrize("window", [1, 2, 7, 15, 40])
def test_sliding_window(window):
    """A window of w sees the token itself and the w - 1 before; one as long as the text sees it all."""
    torch.manual_seed(0)
    layer = SlidingWindowAttention(24, 4, 2, window_size=window).double()
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    assert_close(layer(x)[0], definition(layer, x, window), EXACT)


def test_short_convolutions():
    """With them q, k and v of the formula are convolved; without them the layer has no further weights."""
    torch.manual_seed(0)
    layer = SoftmaxAttention(24, 4, 2, 6, use_short_conv=True, conv_size=3).double()
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    convolved = copy.deepcopy(layer)
    for name in "qkv":
        convolution = getattr(layer, f"{name}_conv1d")
        assert convolution.width == 3
        projection = nn.Sequential(getattr(layer, f"{name}_proj"), convolution)
        setattr(convolved, f"{name}_proj", projection)
    assert_close(layer(x)[0], definition(convolved, x, None), EXACT)
    assert not [name for name in SoftmaxAttention(24, 4).state_dict() if "conv" in name]


@pytest.mark.parametrize("kind", [SoftmaxAttention, SlidingWindowAttention])
def test_short_convolutions_of_cached_padded_and_packed_rows(kind):
    """Any cut into cached calls, padding on either side, and packing give each row's results alone."""
    torch.manual_seed(0)
    window: Any = {"window_size": 4} if kind is SlidingWindowAttention else {}
    layer = kind(24, 4, 2, layer_idx=0, use_short_conv=True, attention_bias=True, **window).double()
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    alone = [layer(x[:1])[0], layer(x[1:, :7])[0]]
    for side in ("left", "right"):
        mask, rows = torch.ones(2, 12).long(), x.clone()
        at = slice(5, 12) if side == "left" else slice(0, 7)
        mask[1], rows[1] = 0, 9.0
        mask[1, at], rows[1, at] = 1, x[1, :7]
        uncut = window and side == "right"  # a window counts padding
        cuts = [(0, 12)] if uncut else [(0, 3), (3, 4), (4, 9), (9, 12)]
        cache, found = StateCache(), []
        with torch.no_grad():
            for a, b in cuts:
                found.append(layer(rows[:, a:b], mask[:, :b], past_key_values=cache)[0])
        whole = torch.cat(found, 1)
        assert_close(whole[:1], alone[0], EXACT)
        assert_close(whole[1:, at], alone[1], EXACT)
    packed = torch.cat([x[:1], x[1:, :7]], 1)
    found = layer(packed, cu_seqlens=torch.tensor([0, 12, 19]))[0]
    assert_close(found, torch.cat(alone, 1), EXACT)


def test_short_convolutions_need_a_cache_with_a_place_for_them():
    """transformers' cache of keys and values has none: it is refused, a model without cache runs."""
    overrides = {"attention": {"use_short_conv": True}}
    config = GKAConfig(
        vocab_size=9, hidden_size=16, num_heads=2, mixers=["attention"], mixer_overrides=overrides
    )
    model: Any = GKAForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    assert model(ids, use_cache=False).logits.shape == (1, 6, 9)
    with pytest.raises(ValueError, match=r"no place for short convolutions.*StateCache"):
        model(ids, use_cache=True)


def test_rotation_is_relative():
    """Products of rotated vectors depend on the difference of positions, and norms on none."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)

    def product(p: int, s: int) -> Tensor:
        place = torch.tensor([[p]]), torch.tensor([[s]])
        return (rotate(q, place[0]) * rotate(k, place[1])).sum(-1)

    assert_close(product(7, 3), product(1007, 1003), EXACT)
    assert abs((product(7, 3) - product(7, 4)).norm()) > 1e-3
    assert_close(rotate(q, torch.tensor([[9]])).norm(dim=-1), q.norm(dim=-1), EXACT)


def test_rotation_formula():
    """Pair (x_i, x_{i+D/2}) turns by p theta^(-2i/D), as in the released models' attention."""
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., 1] = 1.0
    angle = 5 * 100.0 ** (-2 / 4)
    expected = torch.tensor([0, math.cos(angle), 0, math.sin(angle)], dtype=torch.float64)
    assert_close(rotate(x, torch.tensor([[5]]), 100.0)[0, 0, 0], expected, EXACT)


def test_position_ids(tokens):
    """Given positions replace the counted ones: a shift changes nothing, a stretch does."""
    torch.manual_seed(0)
    layer, x = SoftmaxAttention(24, 4).double(), tokens(2, 15)
    places = torch.arange(15)[None]
    counted = layer(x)[0]
    assert_close(layer(x, position_ids=places + 40)[0], counted, EXACT)
    assert (layer(x, position_ids=3 * places)[0] - counted).norm() > 1e-3
    with pytest.raises(ValueError, match=r"position_ids must be \[batch, 15\]"):
        layer(x, position_ids=places[:, :4])


def test_mask_must_cover_the_past(tokens):
    """With a past, a mask of the new tokens alone is refused: where the padding was is not known."""
    layer, x = SoftmaxAttention(24, 4, layer_idx=0).double(), tokens(2, 9)
    _, _, cache = layer(x, use_cache=True)
    with pytest.raises(ValueError, match="9 cached and the 9 new positions, 18 in all; got 9"):
        layer(x, attention_mask=torch.ones(2, 9).bool(), past_key_values=cache)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 5}, "hidden_size = 24 must be a multiple of num_heads = 5"),
        ({"num_heads": 4, "head_dim": 7}, "head_dim must be even"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads = 3"),
        ({"num_heads": 4, "use_short_conv": True, "conv_size": 0}, "conv_size must be a positive"),
        ({"num_heads": 4, "window_size": 0}, "window_size must be a positive integer, got 0"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    """Sizes that do not fit are refused by name."""
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(24, **options)
