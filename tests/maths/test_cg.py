"""Conjugate gradients: the certificate, the steps it takes, and what rounding and bad rows do to it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gka.maths.ridge import Products, System
from gka.maths.solvers import Chebyshev, ConjugateGradients, cg
from gka.maths.solvers.cg import Rows, most_steps, rounding_floor
from gka.maths.solvers.chebyshev import chebyshev_bound, chebyshev_error, convergence_rate
from gka.maths.solvers.exact import exact_solve
from ridge_systems import KEYS, RATIO, STEPS, a_norm, formed, system
from tolerances import assert_close

DECAYS = (None, -1e-4, -2e-3, -5e-3, -2e-2, -1e-1, -5e-1, -1.2, -100.0)
F32, F64 = torch.float32, torch.float64


def queries(s: System) -> Tensor:
    return torch.randn(*s.fro.shape, s.k.shape[-1], dtype=F64).to(s.k.dtype)


def errors(x: Tensor, h: Tensor, q: Tensor, ratio: float = RATIO) -> Tensor:
    """|x - x*|_A / |x*|_A of every token, A formed in float64."""
    lamb = ratio * h.square().sum((-2, -1)).sqrt()
    exact = exact_solve(h, q.double(), lamb)
    return a_norm(x.double() - exact, h, lamb) / a_norm(exact, h, lamb)


def state_of(spectrum: Tensor) -> Tensor:
    """H [1,1,K,K] with these eigenvalues, in a random basis."""
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=F64))[0]
    return (basis * spectrum @ basis.mT)[None, None]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("num_iter", [1, 5, 15, 30])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", KEYS)
def test_error_is_the_certified_one(kind, decay, num_iter, dtype):
    """|x - x*|_A <= |x*|_A / T_{r+1}(1 + 2a) at every token, of which float32 leaves its share of rounding,
    in no more steps than the theory needs."""
    s, h = system(kind, decay, dtype)
    q, solver = queries(s), ConjugateGradients(RATIO, num_iter)
    target = chebyshev_error(RATIO, num_iter)
    assert target <= chebyshev_bound(RATIO, num_iter)
    assert errors(solver.solve(s, q), h, q).max() <= target + rounding_floor(RATIO, dtype) / 8
    assert solver.steps(s, q).max() <= most_steps(RATIO, num_iter)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(1e-3, 10), st.floats(0, 4))
def test_energy_never_exceeds_that_of_the_solution(seed: int, ratio: float, scale: float) -> None:
    """For any x and r = q - A x, x.(q + r) = |x*|_A^2 - |x - x*|_A^2 <= |x*|_A^2, and
    |x - x*|_A^2 <= |r|^2 / lambda."""
    torch.manual_seed(seed)
    h = state_of(torch.rand(6, dtype=F64) ** 4)[0, 0]
    lamb = ratio * h.norm()
    q, x = torch.randn(2, 6, dtype=F64)
    exact = exact_solve(h, q, lamb)
    x = exact + scale * x
    r = q - h @ x - lamb * x
    error, energy = a_norm(x - exact, h, lamb).square(), a_norm(exact, h, lamb).square()
    assert_close(
        x @ (q + r), energy - error, 1e-9 * float(1 + (energy + error) / (energy - error).abs())
    )
    assert error <= r.square().sum() / lamb * (1 + 1e-9) + 1e-12 * energy


@pytest.mark.parametrize("kind", KEYS)
def test_float32_residuals_prove_what_they_say(kind):
    """With r formed anew in float32, after every step, |r|^2 / (a x.(q + r)) is no less than the true
    |x - x*|_A^2 / |x*|_A^2 less rounding."""
    s, h = system(kind, -1e-2, F32)
    q = queries(s)
    groups = (s.k.shape[1], -1)
    products = s.products.map(lambda y: y.unflatten(1, groups).flatten(0, 1))
    fro = s.fro.unflatten(1, groups).flatten(0, 1)
    rows = Rows.start(products, RATIO, fro, q.unflatten(1, groups).flatten(0, 1))
    for _ in range(12):
        rows.step_(1e-7)
        anew = Rows(**vars(rows))
        anew.restart_(1e-7)
        assert_close(rows.energy, anew.energy, 1e-5)
        claimed = (anew.size / (RATIO * anew.energy)).sqrt()
        x = (rows.x / fro.unsqueeze(-1)).unflatten(0, (len(q), -1)).flatten(1, 2)
        true = errors(x, h, q)
        claimed = claimed.unflatten(0, (len(q), -1)).flatten(1, 2)
        assert (true <= claimed + rounding_floor(RATIO, F32) / 8).all()


@pytest.mark.parametrize("ratio", [1e-3, 0.02, 0.5, 30.0])
@pytest.mark.parametrize("num_iter", [1, 4, 30, 90])
def test_limit_suffices_for_the_worst_spectrum(num_iter, ratio, monkeypatch):
    """Eigenvalues at Chebyshev's points, where the bound is nearly attained, are certified within
    `most_steps`: no row is left to the fixed iteration."""
    torch.manual_seed(0)
    dim = 120
    nodes = torch.cos(math.pi * (torch.arange(dim, dtype=F64) + 0.5) / dim)
    spectrum = (1.0 + nodes) / 2.0
    spectrum[1:] *= math.sqrt((1 - spectrum[0] ** 2) / spectrum[1:].square().sum())  # |H|_F = 1
    h, q = state_of(spectrum), torch.randn(1, 1, dim, dtype=F64)
    monkeypatch.setattr(cg, "chebyshev_solve_", None)
    x = ConjugateGradients(ratio, num_iter).solve_state(h, q)
    limit = max(chebyshev_error(ratio, num_iter), rounding_floor(ratio, F64))
    assert errors(x, h, q, ratio).max() <= limit


def test_numbers_of_the_defaults():
    """target = 3.2e-4 and at most 39 steps at a = 0.02, r = 30; 1/T_{r+1} for any r, a, without overflow."""
    assert chebyshev_error(0.02, 30) == pytest.approx(1 / math.cosh(31 * math.acosh(1.04)))
    assert most_steps(0.02, 30) == 39
    assert chebyshev_error(1e9, 10_000) == 0.0 and most_steps(1e9, 10_000) == 10_002
    for ratio in (1e-3, 0.02, 10.0):  # both branches of the same number
        n, rate = most_steps(ratio, 150), convergence_rate(ratio)
        wanted = ((1 + ratio) / ratio) ** 0.5 / cg.MARGIN / chebyshev_error(ratio, 150)
        assert n - 1 < math.asinh(wanted) / rate <= n + 1e-9


def test_as_many_steps_as_eigenvalues():
    """A history of one key has two eigenvalues, lambda and 1 + lambda: two steps, and none where q = 0."""
    k = torch.zeros(1, 1, 1, 1, 8, dtype=F64)
    k[..., 0] = 1.0
    s = System.of_state(k[0].mT @ k[0])
    q = torch.randn(1, 1, 1, 8, dtype=F64)
    solver = ConjugateGradients(RATIO, STEPS)
    assert solver.steps(s, q).item() == 2
    assert solver.steps(s, k[0]).item() == 1  # along an eigenvector
    assert solver.steps(s, 0 * q).item() == 0
    assert (solver.solve(s, 0 * q) == 0).all()


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_row_depends_on_no_other(dtype):
    """Other queries, zero, huge and NaN ones, in a chunk change no bit of a token's solution."""
    s, _ = system("silu", -1e-2, dtype)
    q = queries(s)
    solver = ConjugateGradients(RATIO, STEPS)
    x = solver.solve(s, q)
    other = q.clone()
    other[:, :, 3], other[:, :, 5], other[:, 1, 7] = 0.0, 1e30, torch.nan
    other[:, :, 9] = torch.randn_like(q[:, :, 9])
    found = solver.solve(s, other)
    same = [t for t in range(16) if t not in (3, 5, 7, 9)]
    assert torch.equal(found[:, :, same], x[:, :, same])
    assert torch.isnan(found[:, 1, 7]).all() and torch.isfinite(found[:, 0, 7]).all()
    assert (found[:, :, 3] == 0).all()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-10, 1e10, 1e30])
def test_queries_of_any_size(size):
    """x is proportional to |q| for powers of ten down to float32's smallest normal number."""
    s, h = system("gaussian", -1e-2, F32)
    q = queries(s)
    x = ConjugateGradients(RATIO, STEPS).solve(s, q * size).double() / size
    assert errors(x, h, q).max() <= chebyshev_error(RATIO, STEPS) + 1e-5


def test_state_and_chunk_of_one_token_agree():
    """`solve_state` of H is `solve` of the system that H is."""
    torch.manual_seed(0)
    h = torch.cat([state_of(torch.rand(9, dtype=F64)) for _ in range(3)])
    h[1] = 0.0
    q = torch.randn(3, 1, 9, dtype=F64)
    solver = ConjugateGradients(RATIO, STEPS)
    x = solver.solve_state(h, q)
    assert_close(x, solver.solve(System.of_state(h), q.unsqueeze(-2)).squeeze(-2), 1e-12)
    assert (x[1] == 0).all()


def test_drift_of_the_residual_is_noticed(monkeypatch):
    """Where the updated residual is smaller than the true one (here its products are rounded to bfloat16),
    the one formed anew does not prove the target, and the iteration goes on until it does."""
    s, h = system("silu", -1e-2)
    q, solver = queries(s), ConjugateGradients(RATIO, STEPS)
    exact_steps = solver.steps(s, q)
    product, anew = Products.__call__, Rows.restart_
    rounded = True

    def restart(self, target):
        nonlocal rounded
        rounded = False
        proven = anew(self, target)
        rounded = True
        return proven

    monkeypatch.setattr(
        Products, "__call__",
        lambda self, x: product(self, x).bfloat16().to(x.dtype) if rounded else product(self, x),
    )  # fmt: skip
    monkeypatch.setattr(Rows, "restart_", restart)
    assert errors(solver.solve(s, q), h, q).max() <= chebyshev_error(RATIO, STEPS)
    assert solver.steps(s, q).double().mean() > exact_steps.double().mean() + 2


def test_what_stays_unproven_gets_the_fixed_steps(monkeypatch):
    """With a limit of 3 steps, tokens that need more have Chebyshev's solution to the bit, which counts its
    steps; those that are proven keep theirs."""
    s, h = system("silu with mean", -1e-1)
    q, solver = queries(s), ConjugateGradients(RATIO, STEPS)
    q[:, :, 0] = 0.0
    monkeypatch.setattr(cg, "most_steps", lambda ratio, num_iter: 3)
    x, plain = solver.solve(s, q), Chebyshev(RATIO, STEPS).solve(s, q)
    unproven = (x == plain).all(-1)
    assert unproven[:, :, 1:].any()
    assert (errors(x, h, q)[:, :, 1:] <= chebyshev_error(RATIO, STEPS)).all()
    assert (solver.steps(s, q) == 3 + STEPS * unproven[:, :, 1:].any(-1)).all()


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_systems_of_any_size(size):
    """Keys of size 1e-7 and 1e7 in float32: the same relative error, and the same steps, as unit keys."""
    s, _ = system("silu", -1e-2, F32)
    q, power = queries(s), 2.0 ** round(math.log2(size))
    other = System(s.k * power, s.h * power**2, s.zeta, s.weights)
    solver = ConjugateGradients(RATIO, STEPS)
    assert errors(solver.solve(other, q) * power**2, formed(s), q).max() < 3.3e-4
    assert torch.equal(solver.steps(other, q), solver.steps(s, q))
