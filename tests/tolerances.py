"""Relative 2-norm tolerances by dtype, one table for every test that compares two routes to one result."""

import torch

RELATIVE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in float64; |actual| where expected is zero; inf for NaN."""
    a, e = actual.detach().double(), expected.detach().double()
    if a.shape != e.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(e.shape)}")
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    error, norm = (a - e).norm().item(), e.norm().item()
    return error / norm if norm > 0 else error


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = ""
) -> None:
    """Assert that the relative 2-norm error is within `tolerance`, naming `what` and the error."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3e} > {tolerance:.1e}"
