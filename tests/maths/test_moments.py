"""Decays inside chunks and the scan over chunks."""

import pytest
import torch

from gka.maths.chunked import Chunks, Settings, Tokens
from gka.maths.layout import chunk_layout
from gka.maths.moments import Decay, chunk_moments, scan
from problems import make_problem
from tolerances import assert_close


@pytest.mark.parametrize("rate", [0.0, -0.1, -5.0, -100.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decays_are_products_of_gammas(rate, dtype):
    """M_jt = gamma_{j+1} .. gamma_t, 1 on the diagonal and exactly 0 above it; zeta_t and to_end likewise:
    accurate to rounding at any rate, with no infinity or NaN."""
    torch.manual_seed(0)
    g = rate * torch.rand(1, 1, 12, dtype=torch.float64)
    if rate == -1000.0:
        g[..., 6:] *= 1e-4  # small decays after enormous ones
    decay = Decay.of(g.to(dtype), g.to(dtype).unsqueeze(-1))
    exact = g.to(dtype).double()[0, 0]
    tolerance, tiny = 4 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for t in range(12):
        for j in range(12):
            entry = decay.mask[0, 0, t, j].double()
            if j > t:
                assert entry == 0
            else:
                expected = exact[j + 1 : t + 1].sum().exp()
                assert (entry - expected).abs() <= tolerance * expected * (
                    1 + abs(rate) * 12
                ) + tiny
        for x, part in ((decay.zeta, exact[: t + 1]), (decay.to_end, exact[t + 1 :])):
            expected = part.sum().exp()
            assert (x[0, 0, t].double() - expected).abs() <= 1e-4 * expected + tiny
    assert torch.equal(decay.whole, decay.zeta[..., -1])
    assert decay.mask.dtype == decay.zeta.dtype == dtype


def test_differences_of_large_sums_are_accurate():
    """Behind 32 tokens of g = -100, decays of g = -0.01 keep float32 accuracy (a float32 sum has 6e-5)."""
    g = torch.cat([torch.full((32,), -100.0), torch.full((32,), -0.01)]).view(1, 1, 64)
    decay = Decay.of(g, g.unsqueeze(-1))
    exact = (g.double()[0, 0, 33:].sum()).exp()
    assert abs(decay.mask[0, 0, 63, 32].double() / exact - 1) < 1e-7


def test_no_decay_is_all_ones():
    """g = None means gamma = 1."""
    decay = Decay.of(None, torch.zeros(2, 3, 5, 4))
    assert torch.equal(decay.mask, torch.ones(2, 3, 5, 5).tril())
    for x in (decay.zeta, decay.to_end, decay.whole):
        assert (x == 1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_recursion(reverse):
    """S <- whole S + local along each sequence, from its boundary; an empty sequence hands its own on."""
    torch.manual_seed(0)
    layout = chunk_layout(1, 40, 8, torch.tensor([0, 20, 20, 40]))
    local, whole = torch.randn(6, 2, 3, 4), torch.rand(6, 2)
    boundary = torch.randn(3, 2, 3, 4)
    found, left = scan(local.clone(), whole, boundary, layout, reverse)
    for n in range(3):
        state = boundary[n]
        rows = list(range(layout.offsets[n], layout.offsets[n + 1]))
        for row in reversed(rows) if reverse else rows:
            assert torch.equal(found[row], state)
            state = whole[row, :, None, None] * state + local[row]
        assert torch.equal(left[n], state)


def test_chunk_starts_are_the_states_before_the_chunks():
    """H_[c] and U_[c] are the moments of all tokens before the chunk, with their decays and write gates."""
    p = make_problem(30, (4, 2, 1), (5, 3), decay="separate")
    tokens = Tokens(p.q, p.k, p.v, p.g, p.gk, p.alpha, p.beta, p.h0, p.u0, None)
    chunks = Chunks(tokens, Settings(1.0, 0.02, 1, 8, False, True))
    assert p.g is not None and p.gk is not None and p.beta is not None
    assert p.h0 is not None and p.u0 is not None
    for head in range(4):
        h, u = p.h0[0, head], p.u0[0, head]
        for t in range(30):
            if t % 8 == 0:
                assert_close(chunks.states_h[0][t // 8, head], h, 1e-12)
                assert_close(chunks.states_u[0][t // 8, head], u, 1e-12)
            k = p.beta[0, t, head] * p.k[0, t, head // 2]
            v = p.beta[0, t, head] * p.v[0, t, 0]
            h = p.gk[0, t, head].exp() * h + torch.outer(k, k)
            u = p.g[0, t, head].exp() * u + torch.outer(k, v)
        assert_close(chunks.states_h[1][0, head], h, 1e-12)
        assert_close(chunks.states_u[1][0, head], u, 1e-12)


def test_moments_of_a_chunk():
    """sum_j w_j k_j v_j^T, shared keys and values in place."""
    torch.manual_seed(0)
    w, k, v = torch.rand(2, 4, 6), torch.randn(2, 2, 6, 3), torch.randn(2, 1, 6, 5)
    expected = torch.einsum(
        "mhc,mhck,mhcv->mhkv", w, k.repeat_interleave(2, 1), v.expand(2, 4, 6, 5)
    )
    assert_close(chunk_moments(w, k, v), expected, 1e-6)
