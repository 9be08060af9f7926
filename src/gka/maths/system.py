"""The ridge systems (H_t + lambda_t I) x_t = q_t of some chunks, H_t never formed (section 4.2.1)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn.functional import normalize

from gka.maths.adaptive import adaptive_solve
from gka.maths.chebyshev import Solver, chebyshev_solve_
from gka.maths.grouped import shared_matmul
from gka.maths.ridge import empty_below, frobenius_squared, key_energies, split_empty_in, unit_root


@dataclass(frozen=True)
class Relative:
    """H_t / F_t = r_t H_[c]/|H_[c]| + sum_j R_tj k_j k_j^T / |k_j|^2: weights at most 1, of unit matrices.

    So it is safe to multiply with however small H_t, and however small the keys, are.

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

    Attributes: as of `System`.
    """

    k: Tensor
    h: Tensor
    zeta: Tensor
    weights: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Products":
        """The products of some of the chunks or heads."""
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
        root: what keys are divided by, and H by its square, in the next three; 1 for ordinary keys, [M,Hk].
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
        """[M,Hk], of the bound F_t <= tr H_[c] + sum_j max(1, W_jj) |k_j|^2 of all heads that share a key."""
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
        """What makes <H_[c], H_t>/F_t and k_j^T H_t k_j/F_t of sums of the energies, [M,H,C]."""
        return self.fro / self.unit.square().unsqueeze(-1)

    @classmethod
    def of_state(cls, h: Tensor) -> "System":
        """The system of H [B,H,K,K] itself: a chunk of one token, whose key is in H already."""
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

    def solve(
        self, q: Tensor, ridge_ratio: float, num_iter: int, solver: Solver = "chebyshev"
    ) -> Tensor:
        """x_t within the error bound of r = num_iter steps, zero where the history is empty.

        x_t is a symmetric matrix times q_t: p_r(A_t), or p_n(P_t^-1 A_t) P_t^-1 (`adaptive`).
        """
        q = q.masked_fill(self.empty.unsqueeze(-1), 0.0)
        if solver == "adaptive":
            return adaptive_solve(self, q, ridge_ratio, num_iter)
        return chebyshev_solve_(self.products, q, self.fro, ridge_ratio, num_iter)
