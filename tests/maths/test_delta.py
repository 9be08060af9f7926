"""The delta rule: both forms are the recurrence, and it does what it is for."""

import itertools

import pytest
import torch
from torch import Tensor

from gka.maths.delta import delta_rule_chunks, delta_rule_sequence
from gka.maths.layout import chunk_layout
from tolerances import assert_close

EXACT = 1e-10
LENGTHS = [0, 1, 15, 16, 17, 50]
CHUNK = 16


def draw(length: int, heads: int = 4, batch: int = 2, decay: float = 0.3) -> list[Tensor]:
    """q, k (unit), v, g, beta and S_0 of different sizes K = 5 and V = 7."""
    torch.manual_seed(length)
    q, k = torch.randn(2, batch, length, heads, 5, dtype=torch.float64)
    v = torch.randn(batch, length, heads, 7, dtype=torch.float64)
    g, beta = torch.rand(2, batch, length, heads, dtype=torch.float64)
    state = torch.randn(batch, heads, 5, 7, dtype=torch.float64)
    k = torch.nn.functional.normalize(k, dim=-1)
    return [x.requires_grad_() for x in (q, k, v, -decay * g, beta, state)]


def chunks(inputs: list[Tensor], cu_seqlens: Tensor | None = None, size: int = CHUNK):
    batch, length = inputs[0].shape[:2]
    layout = chunk_layout(batch, length, size, cu_seqlens)
    q, k, v, g, beta, state = inputs
    return delta_rule_chunks(q, k, v, g, beta, state, scale=0.7, layout=layout)


def sequence(inputs: list[Tensor]):
    q, k, v, g, beta, state = inputs
    return delta_rule_sequence(q, k, v, g, beta, state, scale=0.7)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss that weighs every entry of both outputs differently."""
    weights = (torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs)
    loss = torch.stack([(y * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def test_the_recurrence():
    """S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t."""
    q, k, v, g, beta, state = (x.detach()[0] for x in draw(9, batch=1))
    o, final = delta_rule_sequence(*(x[None] for x in (q, k, v, g, beta, state)), scale=0.7)
    for h in range(4):
        s = state[h]
        for t in range(9):
            kt = k[t, h][:, None]
            erase = torch.eye(5, dtype=s.dtype) - beta[t, h] * kt @ kt.T
            s = g[t, h].exp() * erase @ s + beta[t, h] * kt @ v[t, h][None]
            assert_close(o[0, t, h], 0.7 * s.T @ q[t, h], EXACT)
        assert_close(final[0, h], s, EXACT)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_token_by_token(length):
    """Outputs, final states and all gradients of the two forms agree at any length."""
    inputs = draw(length)
    got, expected = chunks(inputs), sequence(inputs)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, EXACT)
    for mine, theirs in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert_close(mine, theirs, EXACT)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_chunk_size_is_no_part_of_the_result(size):
    """Any chunk size gives the same outputs and states."""
    inputs = draw(50)
    for mine, theirs in zip(chunks(inputs, size=size), chunks(inputs), strict=True):
        assert_close(mine, theirs, EXACT)


@pytest.mark.parametrize("cut", [1, 16, 33])
def test_state_carries_the_past(cut):
    """Cut in two at any point, the second part goes on from the first one's final state."""
    inputs = draw(50)
    *tokens, state = inputs
    first, middle = chunks([*(x[:, :cut] for x in tokens), state])
    second, final = chunks([*(x[:, cut:] for x in tokens), middle])
    o, expected = chunks(inputs)
    assert_close(torch.cat([first, second], 1), o, EXACT)
    assert_close(final, expected, EXACT)


def test_packed_equals_separate():
    """Packed sequences, empty ones among them, give outputs, states and gradients of separate ones."""
    bounds = [0, 0, 1, 4, 20, 20, 90]
    *tokens, _ = draw(90, batch=1)
    state = torch.randn(6, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = [*tokens, state]
    o, final = chunks(inputs, torch.tensor(bounds))
    parts = [
        sequence([*(x[:, a:b] for x in tokens), state[n : n + 1]])
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    expected = tuple(
        torch.cat(y, dim) for y, dim in zip(zip(*parts, strict=True), (1, 0), strict=True)
    )
    assert_close(o, expected[0], EXACT)
    assert_close(final, expected[1], EXACT)
    got = gradients((o, final), inputs)
    for mine, theirs in zip(got, gradients(expected, inputs), strict=True):
        assert_close(mine, theirs, EXACT)


@pytest.mark.parametrize("k_heads, v_heads", [(2, 4), (4, 1), (1, 2)])
def test_grouped_heads_equal_repeated_ones(k_heads, v_heads):
    """Keys and values shared by consecutive heads equal repeated ones, gradients included."""
    q, k, v, g, beta, state = draw(40)
    k, v = (x[:, :, :n].detach().requires_grad_() for x, n in ((k, k_heads), (v, v_heads)))
    full = [x.repeat_interleave(4 // x.shape[2], 2) for x in (k, v)]
    inputs = [q, k, v, g, beta, state]
    got, expected = chunks(inputs), sequence([q, *full, g, beta, state])
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, EXACT)
    for mine, theirs in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert_close(mine, theirs, EXACT)


def test_a_written_value_is_read_back_exactly():
    """With beta = 1 and no decay, the value last written to a key is what the key reads, whatever was
    there before: the rule replaces, where linear attention adds."""
    _, k, v, g, beta, state = (x.detach() for x in draw(20))
    k = k[:, :1].expand_as(k)
    inputs = [k, k, v, 0 * g, torch.ones_like(beta), state]
    assert_close(chunks(inputs)[0], 0.7 * v, EXACT)


@pytest.mark.parametrize("decay", [0.0, 3.0, 200.0])
def test_strong_decay_and_repeated_keys_are_finite(decay):
    """No decay, and decay to nothing at every token, with one key throughout: no overflow, no NaN."""
    q, k, v, g, beta, state = draw(50, decay=decay)
    k = k[:, :1].expand_as(k)
    inputs = [q, k, v, g, beta, state]
    got, expected = chunks(inputs), sequence(inputs)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, EXACT)
    leaves = [q, v, g, beta, state]
    assert all(torch.isfinite(grad).all() for grad in gradients(got, leaves))
