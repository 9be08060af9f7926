"""A sketched solve: what its map may be, when it loses nothing, and how much it loses."""

import torch

from gka.maths.reference import reference_sequence, solve_ridge
from gka.maths.sketch import orthonormal, project, sketched_sequence, spectral_basis
from tolerances import RELATIVE, assert_close

EXACT = RELATIVE[torch.float64]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(dim: int = 8, keys: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    k = drawn(keys, dim, seed=seed)
    return k.mT @ k, drawn(dim, seed=seed + 1)


def sketched_solution(h: torch.Tensor, q: torch.Tensor, basis: torch.Tensor, a: float = 0.02):
    return basis @ solve_ridge(basis.mT @ h @ basis, basis.mT @ q, a, 1, "exact")


def test_orthonormal_keeps_the_span_and_is_orthonormal() -> None:
    """S^T S = I and S S^T W = W, in float32 within its precision; equal columns give NaN and no error."""
    weight = drawn(3, 8, 4)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, RELATIVE[torch.float32])):
        s = orthonormal(weight.to(dtype))
        assert s.dtype == dtype
        assert_close(s.mT @ s, torch.eye(4, dtype=dtype).expand(3, 4, 4), tolerance)
        assert_close(s @ (s.mT @ weight.to(dtype)), weight, tolerance)
    weight[1, :, 1] = weight[1, :, 0]
    assert orthonormal(weight).isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_only_the_span_matters() -> None:
    """S R with an orthogonal R gives the same x = S x': the ridge, too, is the same."""
    h, q = system()
    s = orthonormal(drawn(8, 3, seed=5))
    turn = torch.linalg.qr(drawn(3, 3, seed=6)).Q
    assert_close(sketched_solution(h, q, s @ turn), sketched_solution(h, q, s), EXACT)


def test_keys_inside_the_span_lose_nothing() -> None:
    """Then U^T x is the plain readout, for exact and for truncated solves, and with decay and gates; what x
    lacks lies across all keys."""
    s = orthonormal(drawn(2, 8, 3, seed=2))
    k = project(drawn(1, 12, 2, 8, seed=3), s @ s.mT)
    q, v = drawn(1, 12, 2, 8, seed=4), drawn(1, 12, 2, 5, seed=5)
    g, gk, alpha, beta = (-0.1 * torch.rand(4, 1, 12, 2, dtype=torch.float64)).unbind()
    gates, state = (g, gk, -alpha, 1 + beta), (k.new_zeros(1, 2, 8, 8), k.new_zeros(1, 2, 8, 5))
    for solver, steps in (("exact", 1), ("chebyshev", 7)):
        options = {"scale": 1.0, "ridge_ratio": 0.02, "num_iter": steps, "solver": solver}
        plain, _ = reference_sequence(q, k, v, *gates, state, **options)
        found, _ = sketched_sequence(q, k, v, s, *gates, state, **options)
        assert_close(found, plain, EXACT, solver)


def test_the_sketched_solution_is_the_best_in_the_span() -> None:
    """At the sketch's own ridge no y in the span of S has a smaller error |y - x|_A, A = H + lambda' I."""
    h, q = system()
    s = orthonormal(drawn(8, 3, seed=5))
    lamb = 0.02 * (s.mT @ h @ s).square().sum().sqrt()
    a = h + lamb * torch.eye(8, dtype=torch.float64)
    x, found = torch.linalg.solve(a, q), sketched_solution(h, q, s)

    def error(y: torch.Tensor) -> float:
        return float((y - x) @ a @ (y - x))

    assert (
        s.mT @ a @ (found - x)
    ).abs().max() < EXACT * q.norm()  # the error is A-orthogonal to the span
    for seed in range(20):
        assert error(found) < error(found + 1e-3 * s @ drawn(3, seed=seed))


def test_the_ridge_and_condition_number_keep_their_bounds() -> None:
    """|S^T H S|_F <= |H|_F, and H' + lambda' I has a condition number of at most (1 + a) / a."""
    for seed in range(10):
        h, _ = system(seed=seed)
        inside = (s := orthonormal(drawn(8, 3, seed=seed + 50))).mT @ h @ s
        norm = inside.square().sum().sqrt()
        assert norm <= h.square().sum().sqrt()
        values = torch.linalg.eigvalsh(inside) + 0.02 * norm
        assert values[-1] / values[0] <= 1.02 / 0.02


def test_spectral_bases_keep_the_most_energy() -> None:
    """tr(S^T H S) is the sum of the d largest eigenvalues; a random basis keeps less. d = K keeps all."""
    h, q = system()
    values = torch.linalg.eigvalsh(h)
    s = spectral_basis(h, 3)
    assert_close((s.mT @ h @ s).diagonal(), values[-3:].flip(0), EXACT)
    other = orthonormal(drawn(8, 3, seed=9))
    assert (other.mT @ h @ other).trace() < (s.mT @ h @ s).trace()
    whole = sketched_solution(h, q, spectral_basis(h, 8))
    assert_close(whole, solve_ridge(h, q, 0.02, 1, "exact"), EXACT)
