"""Property 2: alpha = 0 is gated linear attention; without gates and with the exact solver the layer
is ridge regression on the past, at every token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gka.ops import chunk_simple_gla
from problems import chunkwise, make_problem, oracle
from tolerances import assert_close


def test_alpha_zero_is_gated_linear_attention() -> None:
    """With alpha = 0 the ridge has no part in the output."""
    p = make_problem(90, (2, 1, 1), (8, 5))
    assert p.alpha is not None
    p = type(p)(**{**vars(p), "alpha": torch.zeros_like(p.alpha)})
    o, _, u = chunkwise(p)
    expected, state = chunk_simple_gla(p.q, p.k, p.v, p.g, 1.0, p.u0, True, beta=p.beta)
    assert state is not None
    assert_close(o, expected, 1e-12, "o")
    assert_close(u, state, 1e-12, "h_kv")


def test_without_gates_it_is_ridge_regression_at_every_token() -> None:
    """o_t = q_t^T argmin_W sum_{i<=t} |W^T k_i - v_i|^2 + lambda_t |W|^2, by least squares."""
    p = make_problem(40, (1, 1, 1), (6, 3), decay="absent", gates="", states=False)
    zeros = {"h0": torch.zeros(1, 1, 6, 6).double(), "u0": torch.zeros(1, 1, 6, 3).double()}
    o, _, _ = oracle(type(p)(**{**vars(p), **zeros}), ridge_ratio=0.02, scale=1.0)
    q, k, v = (x[0, :, 0].numpy() for x in (p.q, p.k, p.v))
    for t in range(40):
        keys, values = k[: t + 1], v[: t + 1]
        lamb = 0.02 * np.linalg.norm(keys.T @ keys)
        rows = np.vstack([keys, np.sqrt(lamb) * np.eye(6)])
        targets = np.vstack([values, np.zeros((6, 3))])
        weights = np.linalg.lstsq(rows, targets, rcond=None)[0]
        np.testing.assert_allclose(o[0, t, 0].numpy(), q[t] @ weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_with_decay_it_is_ridge_regression_on_the_fading_past(rate: float) -> None:
    """S_t minimises lambda_t |S|^2 + sum_i eta_ti |S k_i - v_i|^2, eta_ti = gamma_{i+1} .. gamma_t (eq. 3),
    chunk by chunk and with write gates, which weigh a pair by beta^2."""
    p = make_problem(40, (1, 1, 1), (6, 3), gates="b", states=False)
    assert p.g is not None and p.beta is not None
    o, h, _ = chunkwise(replace(p, g=p.g * rate / 0.2), num_iter=120, chunk_size=16)
    q, k, v = (x[0, :, 0].numpy() for x in (p.q, p.k, p.v))
    g, beta = (p.g * rate / 0.2)[0, :, 0].numpy(), p.beta[0, :, 0].numpy()
    for t in range(40):
        eta = np.exp([g[i + 1 : t + 1].sum() for i in range(t + 1)]) * beta[: t + 1] ** 2
        keys, values = np.sqrt(eta)[:, None] * k[: t + 1], np.sqrt(eta)[:, None] * v[: t + 1]
        lamb = 0.02 * np.linalg.norm(keys.T @ keys)
        rows = np.vstack([keys, np.sqrt(lamb) * np.eye(6)])
        weights = np.linalg.lstsq(rows, np.vstack([values, np.zeros((6, 3))]), rcond=None)[0]
        np.testing.assert_allclose(o[0, t, 0].numpy(), q[t] @ weights, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(h[0, 0].numpy(), keys.T @ keys, rtol=1e-9, atol=1e-10)
