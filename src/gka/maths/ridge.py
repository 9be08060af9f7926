"""The ridge lambda_t = a F_t, F_t = |H_t|_F, and what happens when the history is empty (section 4.1)."""

import math

import torch
from torch import Tensor

from gka.maths.grouped import shared_matmul


def empty_below(dtype: torch.dtype) -> float:
    """F_t below this is an empty history: x_t = 0 and no gradient passes the solve.

    tiny^0.4 (6.7e-16 in float32): x_t grows as 1/F_t and its gradient as 1/F_t^2, and both must
    stay finite. Unit keys reach it only when all of them have faded by that factor.
    """
    return torch.finfo(dtype).tiny ** 0.4


def split_empty(fro_squared: Tensor) -> tuple[Tensor, Tensor]:
    """(F_t, empty_t) from F_t^2 [...]; F_t is 1 where the history is empty, so that 1/F_t is safe."""
    empty = fro_squared < empty_below(fro_squared.dtype) ** 2
    return fro_squared.masked_fill(empty, 1.0).sqrt(), empty


def split_empty_in(fro_squared: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """`split_empty` of F_t^2 given in units of root^4 [...]; F_t is root^2 where the history is empty.

    Where root > 1, F_t^2 below the precision's smallest normal number counts as empty too.
    """
    unit = root.square()
    floor = empty_below(fro_squared.dtype) ** 2 / unit.square()
    empty = fro_squared < floor.clamp_min(torch.finfo(fro_squared.dtype).tiny)
    return fro_squared.masked_fill(empty, 1.0).sqrt() * unit, empty


def square_limit(dtype: torch.dtype) -> float:
    """Norms up to this one have squares, and sums of some of them, that do not overflow."""
    return 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] // 2 - 4)


def unit_root(bound: Tensor) -> Tensor:
    """The root to divide keys by, and H by its square, so that F_t^2 does not overflow, [...].

    1 where F_t <= `bound` [...] has a square far below the largest number, which is everywhere but for keys
    of norm 1e9 (float32); else a power of two, so dividing is exact. NaN and infinity have 1 too.
    """
    top, limit = torch.finfo(bound.dtype).max, square_limit(bound.dtype)
    root = torch.exp2((bound / limit).log2().div(2.0).ceil())
    return root.where((bound > limit) & (bound <= top), torch.ones_like(root))


def key_energies(k: Tensor, h: Tensor) -> Tensor:
    """s_j = k_j^T H_[c] k_j [M,H,C] of keys k [M,Hk,C,K] in chunk-start states h [M,H,K,K]."""
    hk = shared_matmul(h, k.transpose(-1, -2))  # columns H_[c] k_j, [M,H,K,C]
    groups = h.shape[1] // k.shape[1]
    hk = hk.unflatten(1, (k.shape[1], groups))
    return (hk * k.transpose(-1, -2).unsqueeze(2)).sum(-2).flatten(1, 2)


def frobenius_squared(
    h_norm_squared: Tensor, zeta: Tensor, weights: Tensor, energies: Tensor, pair_energies: Tensor
) -> Tensor:
    """F_t^2 inside a chunk (section 4.2.1), a sum of non-negative terms: nothing cancels.

    F_t^2 = zeta_t^2 |H_[c]|^2 + 2 zeta_t sum_j W_tj s_j + sum_ij W_ti W_tj (k_i^T k_j)^2

    Args:
        h_norm_squared: |H_[c]|_F^2 [M,H].
        zeta: decay from the chunk's start to t [M,H,C].
        weights: W_tj = M_jt beta_j^2, zero where j > t, [M,H,C,C].
        energies: s_j = k_j^T H_[c] k_j [M,H,C].
        pair_energies: (W (K K^T)^2)_tj [M,H,C,C].
    """
    start = zeta.square() * h_norm_squared.unsqueeze(-1)
    cross = 2.0 * zeta * (weights @ energies.unsqueeze(-1)).squeeze(-1)
    return start + cross + (weights * pair_energies).sum(-1)
