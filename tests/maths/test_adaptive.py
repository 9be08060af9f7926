"""The adaptive solver's parts: the Nystroem matrix, its certificate, the step count, the iteration."""

import pytest
import torch

from gka.maths.chunked import Chunks, Settings, Tokens
from gka.maths.ridge import System
from gka.maths.solvers import Adaptive, Chebyshev
from gka.maths.solvers.adaptive import Units, nystroem, steps, weights
from gka.maths.solvers.chebyshev import chebyshev_bound, chebyshev_weights
from gka.maths.solvers.exact import exact_solve
from ridge_systems import KEYS, RATIO, STEPS, a_norm, formed, system
from tolerances import assert_close

DECAYS = (None, -1e-4, -1e-3, -1e-2, -1e-1, -1.0, -100.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", KEYS)
def test_certificate_holds(kind, decay, dtype):
    """In float64 arithmetic 0 <= H_t - N_t <= phi_t F_t and the eigenvalues of P_t^-1 A_t lie in
    [1, 1 + phi_t/a], for N_t and phi_t as computed in the working precision."""
    s, h = system(kind, decay, dtype)
    part, fro = nystroem(s), s.fro.double()[..., None, None]
    w = part.w.double().unsqueeze(-1)
    n = part.strength.double()[..., None, None] * w * w.mT
    rest = torch.linalg.eigvalsh(h / fro - n)
    slack = 8 * h.shape[-1] * torch.finfo(dtype).eps
    assert (rest[..., 0] >= -slack * RATIO).all()
    assert (rest[..., -1] <= part.phi.double()).all()
    eye = torch.eye(h.shape[-1], dtype=torch.float64)
    root = torch.linalg.cholesky(n + RATIO * eye)
    inverse = torch.linalg.inv(root)
    spectrum = torch.linalg.eigvalsh(inverse @ (h / fro + RATIO * eye) @ inverse.mT)
    assert (spectrum[..., 0] >= 1 - slack).all()
    assert (spectrum[..., -1] <= 1 + part.phi.double() / RATIO).all()
    assert part.phi.max() <= 1


@pytest.mark.parametrize("kind", KEYS)
def test_certificate_covers_float16_operands(kind):
    """With H_[c]/|H_[c]| and the keys rounded to float16 in the products, the eigenvalues of H_t - N_t
    still stay below phi_t F_t, N_t and phi_t being those of the unrounded system."""
    for decay in DECAYS:
        s, _ = system(kind, decay, torch.float32, dim=64)
        norm = s.h_norm_squared.sqrt()[..., None, None]
        rounded = System(
            (s.k.half().float()), (s.h / norm).half().float() * norm, s.zeta, s.weights
        )
        part = nystroem(s, torch.float16)
        w = part.w.double().unsqueeze(-1)
        n = part.strength.double()[..., None, None] * w * w.mT
        rest = torch.linalg.eigvalsh(formed(rounded) / s.fro.double()[..., None, None] - n)
        assert (rest[..., -1] <= part.phi.double()).all()


@pytest.mark.parametrize("num_iter", [1, 5, 15, 30])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", KEYS)
def test_error_is_within_the_plain_bound(kind, decay, num_iter):
    """|x - x*|_A <= 2 R^(r+1) |x*|_A at every token, with at most r steps."""
    s, h = system(kind, decay)
    q = torch.randn(*h.shape[:-1], dtype=torch.float64)
    exact = exact_solve(h, q, RATIO * s.fro)
    x = Adaptive(RATIO, num_iter).solve(s, q)
    error = a_norm(x - exact, h, RATIO * s.fro) / a_norm(exact, h, RATIO * s.fro)
    assert error.max() <= chebyshev_bound(RATIO, num_iter) + 1e-12
    counts = Adaptive(RATIO, num_iter).steps(s, q)
    assert counts.min() >= 0 and counts.max() <= num_iter


@pytest.mark.parametrize("kind", ["gaussian", "silu", "silu with mean"])
def test_operator_is_symmetric(kind):
    """<y, S x> = <S y, x> for the map S of the right-hand sides of a token to its solution."""
    s, h = system(kind, -1e-2)
    q, y = torch.randn(2, *h.shape[:-1], dtype=torch.float64)
    assert Adaptive(RATIO, STEPS).steps(s, q).min() < STEPS or kind == "gaussian"
    left = (y * Adaptive(RATIO, STEPS).solve(s, q)).sum(-1)
    right = (Adaptive(RATIO, STEPS).solve(s, y) * q).sum(-1)
    assert_close(left, right, 1e-12)


def test_a_token_whose_history_the_common_vector_misses():
    """Without memory (gk = -1000) one key orthogonal to all others of its chunk has N_t = 0 and phi_t = 1,
    also where v^T H_t v is zero or rounding, and its solution is finite and within the bound."""
    for tilt in (0.0, 1e-7):
        k = torch.zeros(1, 16, 1, 8)
        k[..., 0] = 1.0
        k[:, 9] = torch.tensor([tilt, 1, 0, 0, 0, 0, 0, 0])
        gk = torch.full((1, 16, 1), -1000.0)
        tokens = Tokens(k + 0.5, k, k, None, gk, None, None, None, None, None)
        chunks = Chunks(tokens, Settings(1.0, RATIO, STEPS, 16, False, True))
        s = chunks.system(slice(None))
        part = nystroem(s)
        assert part.strength[0, 0, 9] < 1e-6 and part.phi[0, 0, 9] > 0.999
        h = formed(s)
        exact = exact_solve(h, chunks.q.double(), RATIO * s.fro.double())
        e = Adaptive(RATIO, STEPS).solve(s, chunks.q).double() - exact
        lamb = RATIO * s.fro.double()
        assert (a_norm(e, h, lamb) / a_norm(exact, h, lamb)).max() < 1.01 * chebyshev_bound(
            0.02, 30
        )


def test_plain_runs_where_nothing_is_saved():
    """Two equal eigenvalues leave half of H after one is taken out: n = r = 2, and x is the plain
    iteration's, bit by bit."""
    q = torch.randn(1, 1, 1, 16, dtype=torch.float64)
    two = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    two[..., 0, 0] = two[..., 1, 1] = 1.0
    s = System.of_state(two)
    assert Adaptive(RATIO, 2).steps(s, q).item() == 2
    assert torch.equal(Adaptive(RATIO, 2).solve(s, q), Chebyshev(RATIO, 2).solve(s, q))
    one = System.of_state(two + 9 * two[..., :1] @ two[..., :1].mT)
    assert Adaptive(RATIO, 2).steps(one, q) < 2


@pytest.mark.parametrize("phi", [1e-9, 1e-3, 0.1, 0.7])
def test_step_count_is_the_smallest_with_the_bound(phi):
    """1/T_{n+1}(1 + 2a/phi) <= 1/T_{r+1}(1 + 2a) for n, and not for n - 1; r where n > 5r/6."""
    p = torch.tensor(phi, dtype=torch.float64)
    target = torch.cosh((STEPS + 1) * torch.acosh(torch.tensor(1.04, dtype=torch.float64)))

    def enough(n: int) -> bool:
        return bool(torch.cosh((n + 1) * torch.acosh(1 + 0.04 / p)) >= target)

    fewest = next(n for n in range(STEPS + 1) if enough(n))
    n = int(steps(p, RATIO, STEPS))
    assert n == (fewest if fewest <= 25 else STEPS)
    assert fewest == 0 or not enough(fewest - 1)


def test_weights_are_those_of_the_recursion():
    """The closed form equals omega_i = 4/(4 - rho^2 omega_{i-1}) at phi = 1; no phi overflows."""
    one = torch.ones((), dtype=torch.float64)
    expected = torch.tensor(chebyshev_weights(RATIO, 40), dtype=torch.float64)
    assert_close(weights(one, RATIO, 40), expected, 1e-14)
    extreme = torch.tensor([0.0, 1e-300, 1.0], dtype=torch.float64)
    assert torch.isfinite(weights(extreme, 1e-3, 5000)).all()
    assert steps(torch.tensor([0.0, 1.0]).double(), RATIO, STEPS).tolist() == [0, STEPS]


def test_units_put_back_what_they_take():
    """Plain rows come first, the others by falling steps; spans cover each row's steps once, and put
    undoes take."""
    counts = torch.tensor([[3, 5, 0, 2], [30, 30, 1, 30], [2, 2, 2, 2]])
    units = Units(counts, 2, 30)
    x = torch.randn(3, 4, 5)
    assert torch.equal(units.put(units.take(x)), x)
    assert units.plain == 1 and units.take(counts)[0].tolist() == [30, 30]
    assert units.longest == [30, 5, 2, 2, 2]
    done = [sum(len(span) for rows, span in units.spans() if row < rows) for row in range(5)]
    assert done == units.longest
    assert Units(torch.zeros(2, 2, dtype=torch.int64), 1, 30).spans() == []
