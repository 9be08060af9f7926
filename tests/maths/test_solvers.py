"""Ridge, Chebyshev iteration and exact solve."""

import pytest
import torch
from torch import Tensor

from gka.maths.ridge import empty_below, frobenius_squared, key_energies, split_empty
from gka.maths.solvers.chebyshev import (
    chebyshev_bound,
    chebyshev_solve,
    chebyshev_solve_,
    chebyshev_weights,
)
from gka.maths.solvers.exact import exact_solve
from tolerances import assert_close


def system(dim: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """H of a few random keys, q, F."""
    torch.manual_seed(0)
    k = torch.randn(7, dim, dtype=torch.float64)
    h = k.T @ k
    return h, torch.randn(5, dim, dtype=torch.float64), h.norm().expand(5)


def algorithm_1(h: Tensor, q: Tensor, fro: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """The paper's recursion in x, line by line (its omega_0 = 2)."""
    mu, top = ridge_ratio * fro, (1 + ridge_ratio) * fro
    rho = ((top - mu) / (top + mu)).unsqueeze(-1)
    step = (2 / (top + mu)).unsqueeze(-1)
    a = h + ridge_ratio * fro[0] * torch.eye(len(h), dtype=h.dtype)
    omega, before, x = torch.full_like(rho, 2.0), torch.zeros_like(q), step * q
    for _ in range(num_iter):
        omega = 4 / (4 - rho**2 * omega)
        x, before = x - omega * step * (x @ a - q) + (omega - 1) * (x - before), x
    return x


@pytest.mark.parametrize("ridge_ratio", [0.005, 0.02, 0.5])
@pytest.mark.parametrize("num_iter", [1, 2, 7, 30])
def test_residual_form_is_algorithm_1(num_iter, ridge_ratio):
    """Both forms of the iteration here, and in place, are the paper's polynomial."""
    h, q, fro = system()
    expected = algorithm_1(h, q, fro, ridge_ratio, num_iter)
    before = q.clone()
    for solve in (chebyshev_solve, chebyshev_solve_):
        assert_close(solve(lambda d: d @ h, q, fro, ridge_ratio, num_iter), expected, 1e-12)
        assert torch.equal(q, before)


@pytest.mark.parametrize("ridge_ratio", [0.005, 0.02, 0.5])
def test_residual_polynomial_is_chebyshevs(ridge_ratio):
    """q - A x_r = T_{r+1}((L + mu - 2 s)/(L - mu)) / T_{r+1}((L + mu)/(L - mu)) at every eigenvalue s."""
    fro, r = torch.tensor(3.0, dtype=torch.float64), 6
    mu, top = ridge_ratio * fro, (1 + ridge_ratio) * fro
    s = torch.linspace(float(mu), float(top), 50, dtype=torch.float64)
    x = chebyshev_solve(
        lambda d: (s - mu).unsqueeze(-1) * d,
        torch.ones(50, 1).double(),
        fro.expand(50),
        ridge_ratio,
        r,
    )
    degree = r + 1
    inside = torch.cos(degree * torch.acos(((top + mu - 2 * s) / (top - mu)).clamp(-1, 1)))
    outside = torch.cosh(degree * torch.acosh((top + mu) / (top - mu)))
    assert_close(1 - s * x[:, 0], inside / outside, 1e-6)
    assert (1 - s * x[:, 0]).abs().max() <= chebyshev_bound(ridge_ratio, r)


def test_weights_and_bound():
    """omega_1 = 4 / (4 - 2 rho^2); the bound is 3.2e-4 at a = 0.02 (kappa = 51) and 30 steps."""
    rho = 1 / 1.04
    assert chebyshev_weights(0.02, 2)[0] == pytest.approx(4 / (4 - 2 * rho**2))
    assert len(chebyshev_weights(0.02, 30)) == 30
    assert chebyshev_bound(0.02, 30) == pytest.approx(3.2e-4, rel=0.02)


def test_exact_solve():
    """(H + lambda I) x = q, in the dtype of the inputs, and differentiable."""
    h, q, fro = system()
    x = exact_solve(h, q, 0.02 * fro)
    assert_close(x @ h + 0.02 * fro[0] * x, q, 1e-12)
    assert exact_solve(h.float(), q.float(), 0.02 * fro.float()).dtype == torch.float32


def test_frobenius_norm_inside_a_chunk():
    """F_t^2 from the chunk's parts equals |H_t|^2, shared keys included."""
    torch.manual_seed(0)
    heads, c, dim = 4, 6, 5
    k = torch.randn(1, 2, c, dim, dtype=torch.float64)
    root = torch.randn(1, heads, dim, dim, dtype=torch.float64)
    h = root @ root.mT
    zeta = torch.rand(1, heads, c, dtype=torch.float64)
    weights = torch.rand(1, heads, c, c, dtype=torch.float64).tril()
    full = k.repeat_interleave(2, 1)
    pairs = weights @ (full @ full.mT).square()
    squared = frobenius_squared(h.square().sum((-2, -1)), zeta, weights, key_energies(k, h), pairs)
    explicit = zeta[..., None, None] * h.unsqueeze(2) + torch.einsum(
        "mhtj,mhjk,mhjl->mhtkl", weights, full, full
    )
    assert_close(squared.sqrt(), explicit.square().sum((-2, -1)).sqrt(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_histories_are_told_by_a_threshold(dtype):
    """Below the threshold F is replaced by 1 and marked; above it F is itself; 1/(a F)^2 never overflows."""
    floor = empty_below(dtype)
    sizes = torch.tensor([0.0, 0.9 * floor, 1.1 * floor, 1.0], dtype=dtype)
    fro, empty = split_empty(sizes.square())
    assert empty.tolist() == [True, True, False, False]
    assert fro[:2].tolist() == [1.0, 1.0]
    assert_close(fro[2:], sizes[2:], 1e-5)
    assert torch.isfinite((0.005 * fro).square().reciprocal()).all()
