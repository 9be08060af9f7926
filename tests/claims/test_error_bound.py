"""Property 5: the error falls at least as fast as Chebyshev's bound; the condition number is bounded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.maths.reference import solve_ridge
from gka.maths.solvers.chebyshev import chebyshev_bound
from problems import Decay, chunkwise, make_problem, oracle

KINDS = ("gaussian", "silu", "aligned", "repeated", "few")


def history(kind: str, decay: float, seed: int = 0, dim: int = 24) -> Tensor:
    """H of 80 unit keys of some kind, decayed by exp(-decay) a token."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(80, dim, generator=generator, dtype=torch.float64)
    if kind == "silu":
        k = silu(k)
    elif kind == "aligned":
        k = 0.1 * k + 1.0
    elif kind == "repeated":
        k = k[:1].expand(80, -1)
    elif kind == "few":
        k = k[:3].repeat(27, 1)[:80]
    k = normalize(k, dim=-1)
    weights = torch.exp(-decay * torch.arange(79, -1, -1, dtype=torch.float64))
    return k.T @ (weights[:, None] * k)


def a_norm(x: Tensor, h: Tensor, lamb: Tensor) -> Tensor:
    return (x @ h @ x + lamb * x @ x).sqrt()


@pytest.mark.parametrize("ridge_ratio", [0.005, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.1, 5.0])
def test_error_is_within_the_bound_for_every_number_of_steps(
    kind: str, decay: float, ridge_ratio: float
) -> None:
    """|x_r - x*|_A <= 2 R^(r+1) |x*|_A for r = 1..30."""
    h = history(kind, decay)
    lamb = ridge_ratio * h.norm()
    q = normalize(torch.randn(24, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    exact = solve_ridge(h, q, ridge_ratio, 1, "exact")
    for r in range(1, 31):
        error = a_norm(solve_ridge(h, q, ridge_ratio, r) - exact, h, lamb) / a_norm(exact, h, lamb)
        assert error <= chebyshev_bound(ridge_ratio, r) + 1e-13, r


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.floats(0, 20), st.integers(0, 1000), st.floats(0.005, 0.5))
def test_condition_number_is_never_above_its_bound(
    kind: str, decay: float, seed: int, ridge_ratio: float
) -> None:
    """cond(H_t + lambda_t I) <= (1 + a)/a, whatever the keys and the decay."""
    h = history(kind, decay, seed)
    eigenvalues = torch.linalg.eigvalsh(h + ridge_ratio * h.norm() * torch.eye(24).double())
    assert eigenvalues[-1] / eigenvalues[0] <= (1 + ridge_ratio) / ridge_ratio * (1 + 1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 30),
    st.floats(0.005, 0.5),
    st.integers(0, 1000),
    st.sampled_from(["tied", "separate", "absent"]),
)
def test_error_of_the_chunkwise_solutions_is_within_the_bound(
    num_iter: int, ridge_ratio: float, seed: int, decay: Decay
) -> None:
    """|x_r - x*| <= 2 R^(r+1) |x*| (2-norm: the residual polynomial of a symmetric matrix) at every token of
    the chunk-wise form, chunk borders, write gates and initial states included."""
    p = make_problem(40, (2, 1, 2), (8, 8), decay=decay, gates="b", seed=seed)
    read = torch.eye(8, dtype=torch.float64).expand(1, 2, 8, 8)  # U = I: o is x
    p = replace(p, v=torch.zeros_like(p.v), u0=read, g=None, gk=p.g if p.tied else p.gk, tied=False)
    x, *_ = chunkwise(p, num_iter=num_iter, ridge_ratio=ridge_ratio, chunk_size=16)
    exact, *_ = oracle(p, ridge_ratio=ridge_ratio)
    error = (x - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() <= chebyshev_bound(ridge_ratio, num_iter) + 1e-12
