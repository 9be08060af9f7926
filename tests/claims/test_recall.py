"""Property 6: what the memory gives back when it is asked for what was written."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.maths.solvers.exact import exact_solve
from gka.ops import chunk_gka
from tolerances import assert_close


def read_back(k: Tensor, v: Tensor, **settings) -> Tensor:
    """Write pairs (k_i, v_i), then ask for every k_i with writing switched off. k [N,K], v [N,V]."""
    n = len(k)
    q = torch.cat([torch.zeros_like(k), k])
    keys, values = torch.cat([k, torch.zeros_like(k)]), torch.cat([v, torch.zeros_like(v)])
    o, _ = chunk_gka(*(x[None, :, None] for x in (q, keys, values)), scale=1.0, **settings)
    return o[0, n:, 0]


@pytest.mark.parametrize("pairs", [1, 4, 16])
def test_orthonormal_keys_are_read_back_scaled(pairs: int) -> None:
    """N <= K orthonormal keys come back as v / (1 + lambda) with lambda = a sqrt(N)."""
    torch.manual_seed(0)
    k = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0][:pairs]
    v = torch.randn(pairs, 8, dtype=torch.float64)
    expected = v / (1 + 0.02 * pairs**0.5)
    assert_close(read_back(k, v, num_iter=120), expected, 1e-10, "recall")


def test_correlated_keys_keep_the_error_of_ridge_regression() -> None:
    """With correlated keys recall stays ridge regression's; linear attention's error grows with them."""
    torch.manual_seed(0)
    common, own = torch.randn(32, dtype=torch.float64), torch.randn(16, 32, dtype=torch.float64)
    v = torch.randn(16, 8, dtype=torch.float64)
    linear = []
    for correlation in (0.0, 0.5, 0.9):
        k = normalize(correlation**0.5 * common + (1 - correlation) ** 0.5 * own, dim=-1)
        h = k.T @ k
        ridge = exact_solve(h.expand(16, -1, -1), k, 0.02 * h.norm().expand(16)) @ (k.T @ v)
        assert_close(read_back(k, v, num_iter=120), ridge, 1e-10, f"correlation {correlation}")
        linear.append(((read_back(k, v, num_iter=0) - v).norm() / v.norm()).item())
        assert (ridge - v).norm() / v.norm() < linear[-1]
    assert linear[0] < linear[1] < linear[2]
