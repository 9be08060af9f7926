"""The ridge systems (H_t + lambda_t I) x_t = q_t with lambda_t = a F_t, F_t = |H_t|_F (sections 4.1, 4.2.1).

H_t is never formed. An empty history gives x_t = 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.maths.grouped import shared_matmul


def empty_below(dtype: torch.dtype) -> float:
    """The F_t below which a history is empty: x_t = 0, and no gradient passes through the solve.

    tiny^0.4 (6.7e-16 in float32), because x_t grows as 1/F_t and its gradient as 1/F_t^2, and both must
    stay finite. Unit keys fall below it only when all of them have faded by that factor.
    """
    return torch.finfo(dtype).tiny ** 0.4


def split_empty(fro_squared: Tensor) -> tuple[Tensor, Tensor]:
    """(F_t, empty_t) from F_t^2 [...]; F_t is 1 where the history is empty, so that 1/F_t is safe."""
    empty = fro_squared < empty_below(fro_squared.dtype) ** 2
    return fro_squared.masked_fill(empty, 1.0).sqrt(), empty


def split_empty_in(fro_squared: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """`split_empty` of F_t^2 given in units of root^4 [...]; F_t is root^2 where the history is empty.

    If root > 1, a history with F_t^2 below the smallest normal number is empty, too.
    """
    unit = root.square()
    floor = empty_below(fro_squared.dtype) ** 2 / unit.square()
    empty = fro_squared < floor.clamp_min(torch.finfo(fro_squared.dtype).tiny)
    return fro_squared.masked_fill(empty, 1.0).sqrt() * unit, empty


def square_limit(dtype: torch.dtype) -> float:
    """The norm up to which squares, and sums of a few of them, do not overflow."""
    return 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] // 2 - 4)


def unit_root(bound: Tensor) -> Tensor:
    """Divisor of keys (and, squared, of H) that keeps F_t^2 from overflowing, [...].

    It is 1 if the square of `bound` [...] >= F_t is far below the largest number, as for all keys of norm
    below 1e9 (float32), and if `bound` is NaN or infinite. Otherwise it is a power of two, so that the
    division is exact.
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


def frobenius(h: Tensor) -> tuple[Tensor, Tensor]:
    """(F, empty) [B,H] of formed states H [B,H,K,K]."""
    trace = h.diagonal(dim1=-2, dim2=-1).abs().sum(-1)  # F <= tr H
    # on a CPU the values can be read at no cost: ordinary states need no scaled copy
    if h.device.type == "cpu" and bool((trace <= square_limit(h.dtype)).all()):
        return split_empty(torch.linalg.vector_norm(h, dim=(-2, -1)).square())
    root = unit_root(trace)
    small = h / root.square()[..., None, None]
    return split_empty_in(torch.linalg.vector_norm(small, dim=(-2, -1)).square(), root)


@dataclass(frozen=True)
class Relative:
    """H_t / F_t = r_t H_[c]/|H_[c]| + sum_j R_tj k_j k_j^T / |k_j|^2: unit matrices, weights at most 1.

    Products with it neither overflow nor underflow, however small H_t and the keys are.

    Attributes:
        k: k_j / |k_j| [M,Hk,C,K].
        h: H_[c] / |H_[c]| [M,H,K,K].
        of_keys: R_tj = W_tj |k_j|^2 / F_t [M,H,C,C].
        of_start: r_t = zeta_t |H_[c]| / F_t [M,H,C].
    """

    k: Tensor
    h: Tensor
    of_keys: Tensor
    of_start: Tensor


@dataclass(frozen=True)
class Products:
    """The map x_t -> H_t x_t = zeta_t H_[c] x_t + sum_j W_tj (k_j . x_t) k_j of rows x_t [M,H,C,K].

    Attributes: see `System`.
    """

    k: Tensor
    h: Tensor
    zeta: Tensor
    weights: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Products":
        """Apply `change`, which selects chunks or heads, to every array."""
        return Products(change(self.k), change(self.h), change(self.zeta), change(self.weights))

    def __call__(self, x: Tensor) -> Tensor:
        scores = shared_matmul(x, self.k.transpose(-1, -2)).mul_(self.weights)
        return shared_matmul(scores, self.k).addcmul_(self.zeta.unsqueeze(-1), x @ self.h)


class System:
    """H_t and lambda_t of every token t of some chunks, never formed: products, norms and solves.

    Attributes:
        k: keys [M,Hk,C,K].
        h: chunk-start states H_[c] [M,H,K,K].
        zeta: decay from the chunk's start [M,H,C].
        weights: W_tj = M_jt beta_j^2 [M,H,C,C].
        root: divisor of keys (squared: of H) in the next three, 1 for ordinary keys, [M,Hk].
        energies: s_j = k_j^T H_[c] k_j [M,H,C], over root^4.
        pair_energies: (W (K K^T)^2)_tj [M,H,C,C], over root^4.
        h_norm_squared: |H_[c]|^2 [M,H], over root^4.
        fro: F_t, root^2 where empty, [M,H,C].
        empty: no history at t [M,H,C].
    """

    def __init__(self, k: Tensor, h: Tensor, zeta: Tensor, weights: Tensor) -> None:
        self.k, self.h, self.zeta, self.weights = k, h, zeta, weights
        self.k_t = k.transpose(-1, -2)
        self.root = self._root()
        small_k = k / self.root[..., None, None]
        small_h = h / self.unit[..., None, None]
        self.energies = key_energies(small_k, small_h)
        self.pair_energies = shared_matmul(weights, (small_k @ small_k.mT).square())
        self.h_norm_squared = small_h.square_().sum((-2, -1))
        squared = frobenius_squared(
            self.h_norm_squared, zeta, weights, self.energies, self.pair_energies
        )
        self.fro, self.empty = split_empty_in(squared, self.unit.sqrt().unsqueeze(-1))

    def _root(self) -> Tensor:
        """[M,Hk], from F_t <= tr H_[c] + sum_j max(1, W_jj) |k_j|^2 for all heads that share a key."""
        written = self.weights.diagonal(dim1=-2, dim2=-1).clamp_min(1.0)
        shared = self.k.shape[1]
        keys = written.unflatten(1, (shared, -1)) * self.k.square().sum(-1).unsqueeze(2)
        trace = self.h.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
        return unit_root((trace.unflatten(1, (shared, -1)) + keys.sum(-1)).amax(-1))

    @property
    def unit(self) -> Tensor:
        """root^2, the unit of F_t, [M,H]."""
        return self.root.square().repeat_interleave(self.h.shape[1] // self.k.shape[1], 1)

    @property
    def energy_divisor(self) -> Tensor:
        """Divisor that turns sums of energies into <H_[c], H_t>/F_t and k_j^T H_t k_j/F_t, [M,H,C]."""
        return self.fro / self.unit.square().unsqueeze(-1)

    @classmethod
    def of_state(cls, h: Tensor) -> "System":
        """The system of a state H [B,H,K,K]: a chunk of one token, whose key is already in H."""
        batch, heads, dim, _ = h.shape
        nothing = h.new_zeros(batch, heads, 1, 1)
        return cls(h.new_zeros(batch, 1, 1, dim), h, h.new_ones(batch, heads, 1), nothing)

    @cached_property
    def relative(self) -> Relative:
        fro, key_norms = self.fro, self.k.square().sum(-1)
        key_norms = key_norms.repeat_interleave(self.h.shape[1] // self.k.shape[1], 1)
        norm = self.h_norm_squared.sqrt() * self.unit
        floor = empty_below(fro.dtype)
        return Relative(
            k=normalize(self.k, dim=-1, eps=floor),
            h=self.h / norm.clamp_min(floor)[..., None, None],
            of_keys=self.weights * key_norms.unsqueeze(-2) / fro.unsqueeze(-1),
            of_start=self.zeta * norm.unsqueeze(-1) / fro,
        )

    @property
    def products(self) -> Products:
        return Products(self.k, self.h, self.zeta, self.weights)

    def apply(self, x: Tensor) -> Tensor:
        """H_t x_t of rows x_t [M,H,C,K]."""
        return self.products(x)
