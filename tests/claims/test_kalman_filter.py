"""Property 3: with constant lambda the exact map is the Kalman filter's recursion (eq. 16)."""

import torch
from torch.nn.functional import normalize

from gka.maths.solvers.exact import exact_solve
from tolerances import assert_close


def test_exact_map_equals_recursive_least_squares() -> None:
    """S_t = S_{t-1} + (v_t - S_{t-1} k_t) gain_t^T, S_0 = 0, Sigma_0 = I / lambda, gives U_t^T A_t^-1 q_t."""
    torch.manual_seed(0)
    lamb, dim = torch.tensor(0.3).double(), 6
    q, k = normalize(torch.randn(2, 50, dim, dtype=torch.float64), dim=-1)
    v = torch.randn(50, 4, dtype=torch.float64)
    s, sigma = torch.zeros(4, dim).double(), torch.eye(dim).double() / lamb
    h, u = torch.zeros(dim, dim).double(), torch.zeros(dim, 4).double()
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        gain = sigma @ k_t / (1 + k_t @ sigma @ k_t)
        s = s + torch.outer(v_t - s @ k_t, gain)
        sigma = sigma - torch.outer(gain, k_t @ sigma)
        h, u = h + torch.outer(k_t, k_t), u + torch.outer(k_t, v_t)
        assert_close(u.T @ exact_solve(h, q_t, lamb), s @ q_t, 1e-10, "prediction")
