"""ShortConvolution against its definition."""

import itertools

import pytest
import torch
from torch import Tensor

from gka.layers import ShortConvolution
from tolerances import RELATIVE, assert_close

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


def make(width: int) -> tuple[ShortConvolution, Tensor]:
    torch.manual_seed(width)
    return ShortConvolution(5, width).double(), torch.randn(2, 12, 5, dtype=torch.float64)


@pytest.mark.parametrize("width", range(1, 9))
def test_definition(width):
    """Outputs and gradients are those of the definition, for widths 1 to 8."""
    convolution, x = make(width)
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
    convolution, x = make(width)
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
    convolution, x = make(4)
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
    convolution, x = make(width)
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
    convolution, x = make(4)
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
