"""Streams and memories of `key-statistics`."""

import torch

from gka.experiments.reproduce import regressions as reg
from gka.maths.delta import delta_rule_sequence


def test_streams_are_what_their_names_say() -> None:
    """Unit keys; values of the map with noise; the condition number sets how unequal directions are."""
    for kind in reg.STREAMS:
        stream = reg.draw_stream(kind, 2, 8, 100.0, 0.0, 0)
        assert stream.at == (8, 40, 264) and stream.k.shape == stream.v.shape == (2, 264, 8)
        torch.testing.assert_close(stream.k.norm(dim=-1), torch.ones(2, 264))
        w = torch.linalg.lstsq(stream.k, stream.v).solution
        left = (stream.k @ w - stream.v).norm() / stream.v.norm()
        assert (left > 0.05) == (kind == "drifting map")
    values = [
        torch.linalg.eigvalsh(reg.draw_stream("stationary", 1, 8, c, 0.1, 0).k.mT[0].cov())
        for c in (1.0, 1000.0)
    ]
    assert values[0][-1] / values[0][0] < 4 and values[1][-1] / values[1][0] > 50


def test_memories_are_the_recursions() -> None:
    """Moments, linear attention and the gated delta rule equal their token by token forms."""
    stream = reg.draw_stream("rotating keys", 2, 4, 10.0, 0.5, 0)
    h = torch.zeros(2, 4, 4, dtype=torch.float64)
    for t in range(stream.at[1]):
        k_t = stream.k[:, t].double()
        h = 0.98 * h + k_t[..., None] * k_t[:, None]
    torch.testing.assert_close(reg.moments(stream, 0.98)[0][:, 1], h)
    g, beta = (torch.full((2, stream.at[-1], 1), x) for x in (torch.tensor(0.98).log().item(), 0.4))
    k, v = stream.k.unsqueeze(2), stream.v.unsqueeze(2)
    _, state = delta_rule_sequence(k, k, v, g, beta, torch.zeros(2, 1, 4, 4), scale=1.0)
    wanted = stream.q[:, -1] @ state[:, 0]
    found = reg.delta_rule(stream)[0.98, 0.4][:, -1]
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)


def test_the_kalman_filter_of_a_fixed_map_is_ridge_regression() -> None:
    """Without drift its mean solves (K^T K + noise^2 I) W = K^T V, and nothing predicts better."""
    stream = reg.draw_stream("stationary", 4, 8, 30.0, 0.3, 0)
    k, v = stream.k.double(), stream.v.double()
    eye = 0.3**2 * torch.eye(8, dtype=torch.float64)
    w = torch.linalg.solve(k.mT @ k + eye, k.mT @ v)
    found = reg.kalman_filter(stream)
    torch.testing.assert_close(found[:, -1], stream.q[:, -1].double() @ w)
    other = reg.draw_stream("stationary", 4, 8, 30.0, 0.3, 1)
    best = reg.error(found, stream.y)[-1]
    for memory in (reg.linear_attention, reg.delta_rule, reg.ridge):
        constants, errors = reg.tuned(memory(other), other, memory(stream), stream)
        assert errors[-1] > 0.95 * best and constants in memory(stream)


def test_constants_are_chosen_on_the_other_stream() -> None:
    """The choice, and the scale, that are best there are used here, even if another would be better."""
    stream, other = (reg.draw_stream("stationary", 2, 4, 1.0, 0.1, s) for s in (0, 1))
    bad = torch.randn_like(stream.y.double())
    choices = {(1.0,): 0.5 * other.y.double(), (2.0,): bad}
    readings = {(1.0,): bad, (2.0,): stream.y.double()}
    constants, errors = reg.tuned(choices, other, readings, stream)
    assert constants == (1.0,)
    torch.testing.assert_close(errors, reg.error(2 * bad, stream.y))
