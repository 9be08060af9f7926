"""The ridge systems of a chunk, whose H_t is never formed."""

import torch
from torch import Tensor

from gka.maths.chunked import Chunks, Settings, Tokens
from gka.maths.grouped import group_sum, group_sum_matmul, shared_matmul, weight_shared
from problems import make_problem
from tolerances import assert_close


def example() -> tuple[Chunks, Tensor]:
    """Two chunks of four heads on two keys, and H_t of every token [M,H,C,K,K] formed outright."""
    p = make_problem(16, (4, 2, 1), (5, 3), decay="separate")
    tokens = Tokens(p.q, p.k, p.v, p.g, p.gk, p.alpha, p.beta, p.h0, p.u0, None)
    chunks = Chunks(tokens, Settings(1.0, 0.02, 1, 8, False, True))
    assert p.gk is not None and p.beta is not None and p.h0 is not None
    h, histories = p.h0, []
    for t in range(16):
        k = p.beta[:, t].unsqueeze(-1) * p.k[:, t].repeat_interleave(2, 1)
        h = p.gk[:, t].exp()[..., None, None] * h + k.unsqueeze(-1) * k.unsqueeze(-2)
        histories.append(h)
    formed = torch.stack(histories, 2)[0].unflatten(1, (2, 8)).transpose(0, 1)
    return chunks, formed


def test_product_and_norm_are_those_of_h():
    """apply(X) rows are H_t x_t; fro is |H_t|_F."""
    chunks, h = example()
    system = chunks.system(slice(None))
    x = torch.randn_like(chunks.q)
    assert_close(system.apply(x), (h @ x.unsqueeze(-1)).squeeze(-1), 1e-12)
    assert_close(system.fro, h.square().sum((-2, -1)).sqrt(), 1e-12)
    assert not system.empty.any()


def test_relative_history_is_h_over_f():
    """H_t / F_t as weights of unit matrices: it is H_t / F_t, and no weight exceeds 1, however small H is."""
    chunks, h = example()
    system = chunks.system(slice(None))
    relative = system.relative
    k = relative.k.repeat_interleave(2, 1)
    formed = relative.of_start[..., None, None] * relative.h.unsqueeze(2) + torch.einsum(
        "mhtj,mhjk,mhjl->mhtkl", relative.of_keys, k, k
    )
    assert_close(formed, h / system.fro[..., None, None], 1e-12)
    assert relative.of_keys.max() <= 1 + 1e-12 and relative.of_start.max() <= 1 + 1e-12


def test_grouped_products_equal_repeated_heads():
    """Products with shared heads equal those with the heads repeated; sums over groups their transposes."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 5, 7)
    assert_close(shared_matmul(a, b), a @ b.repeat_interleave(2, 1), 1e-6)
    c = torch.randn(2, 6, 4, 7)
    summed = (a.mT @ c).unflatten(1, (3, 2)).sum(2)
    assert_close(group_sum_matmul(a, c, 3), summed, 1e-6)
    assert_close(group_sum(a, 3), a.unflatten(1, (3, 2)).sum(2), 1e-6)
    assert group_sum(a, 6) is a
    w = torch.rand(2, 6, 5)
    assert_close(weight_shared(w, b), w.unsqueeze(-1) * b.repeat_interleave(2, 1), 1e-6)
