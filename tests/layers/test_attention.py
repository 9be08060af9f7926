"""SoftmaxAttention and SlidingWindowAttention against the formula, and rotary positions."""

import math

import pytest
import torch
from torch import Tensor

from gka.layers import SlidingWindowAttention, SoftmaxAttention, rotate
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
        ({"num_heads": 4, "window_size": 0}, "window_size must be a positive integer, got 0"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    """Sizes that do not fit are refused by name."""
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(24, **options)
