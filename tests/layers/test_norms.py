"""Norms against their formulas."""

import pytest
import torch

from gka.layers import GatedRMSNorm, RMSNorm
from gka.layers.parts.modules import unit
from tolerances import assert_close


def make(kind: type[RMSNorm]) -> RMSNorm:
    norm = kind(16, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    return norm.double()


def formula(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def test_rms_norm():
    """weight * x / sqrt(mean(x^2) + eps)."""
    torch.manual_seed(0)
    norm, x = make(RMSNorm), torch.randn(3, 5, 16, dtype=torch.float64)
    assert_close(norm(x), formula(norm, x), 1e-14)


def test_gated_rms_norm():
    """The norm comes first, then SiLU of the gate multiplies it."""
    torch.manual_seed(0)
    norm, x, gate = make(GatedRMSNorm), *torch.randn(2, 3, 5, 16, dtype=torch.float64)
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
