"""Ridge systems of chunks of keys of many kinds, and what a solution's error is measured in."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.maths.chunked import Chunks, Settings, Tokens
from gka.maths.ridge import System

KEYS = ("gaussian", "silu", "silu with mean", "clustered", "repeated", "low rank", "power law")
RATIO, STEPS = 0.02, 30


def keys(kind: str, *shape: int) -> Tensor:
    """Unit keys [..., T, H, K] of a family, float64."""
    dim = shape[-1]
    k = torch.randn(*shape, dtype=torch.float64)
    if kind == "silu":
        k = silu(k)
    elif kind == "silu with mean":
        k = silu(k + 1.0)
    elif kind == "clustered":
        centres = torch.randn(5, dim, dtype=torch.float64)
        k = centres[torch.randint(5, shape[:-1])] + 0.1 * k
    elif kind == "repeated":
        k = k[:, :1].expand(shape)
    elif kind == "low rank":
        k = k[..., :3] @ torch.randn(3, dim, dtype=torch.float64)
    elif kind == "power law":
        k = silu(3.0 * k * torch.arange(1, dim + 1) ** -0.5)
    return normalize(k, dim=-1)


def system(
    kind: str, decay: float | None, dtype: torch.dtype = torch.float64, dim: int = 24, seed: int = 0
) -> tuple[System, Tensor]:
    """Systems of 5 chunks of 16 tokens (the last not full), 4 heads on 2 keys, write gates and an
    initial state; and H_t formed, float64 [M,H,C,K,K]."""
    torch.manual_seed(seed)
    k = keys(kind, 1, 76, 2, dim).to(dtype)
    q = keys("gaussian", 1, 76, 4, dim).to(dtype)
    root = torch.randn(1, 4, dim, dim, dtype=torch.float64)
    h0 = (0.1 * root @ root.mT / dim).to(dtype)
    gk = None if decay is None else torch.full((1, 76, 4), decay, dtype=dtype)
    beta = (0.1 + 0.9 * torch.rand(1, 76, 4)).to(dtype)
    tokens = Tokens(q, k, k, None, gk, None, beta, h0, None, None)
    s = Chunks(tokens, Settings(1.0, RATIO, STEPS, 16, False, True)).system(slice(None))
    return s, formed(s)


def formed(s: System) -> Tensor:
    """H_t [M,H,C,K,K] in float64."""
    k = s.k.double().repeat_interleave(s.h.shape[1] // s.k.shape[1], 1)
    start = s.zeta.double()[..., None, None] * s.h.double().unsqueeze(2)
    return start + torch.einsum("mhtj,mhjk,mhjl->mhtkl", s.weights.double(), k, k)


def a_norm(e: Tensor, h: Tensor, lamb: Tensor) -> Tensor:
    """|e|_A, A = H + lambda I."""
    return (torch.einsum("...k,...kl,...l->...", e, h, e) + lamb * e.square().sum(-1)).sqrt()
