"""The rank-one Nystroem part N_t of every H_t, and a certified bound of what it leaves.

With one unit vector v for a chunk,
    u_t = H_t v,  theta_t = v^T u_t,  N_t = u_t u_t^T / theta_t <= H_t,
    R_t = H_t - N_t >= 0,  |R_t|_2 <= phi_t F_t,
so that P_t = lambda_t I + N_t <= A_t and the eigenvalues of P_t^-1 A_t lie in [1, 1 + phi_t/a]
(proofs: docs/numerics.md). Everything is relative to |H_[c]|, |k_j| and F_t: no size of H_t leaves
the range of the precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from gka.maths.grouped import shared_matmul

if TYPE_CHECKING:
    from gka.maths.system import Relative, System

# theta_t is taken larger by this much of F_t: where v misses H_t, u_t is rounding and N_t must vanish.
THETA_FLOOR = 2.0**-10


@dataclass(frozen=True)
class Slack:
    """What the certificate allows for rounding (docs/numerics.md).

    Attributes:
        arithmetic: 8 K u, u the unit roundoff of the working precision: of the error of
            |R_t|_F^2 / F_t^2, a sum of four terms of size 1 from inner products of length K.
        operands: 2 u of the dtype in which the solve's products hold H_[c] and the keys: of what
            that rounding adds to |R_t|_2 / F_t.
    """

    arithmetic: float
    operands: float

    @classmethod
    def of(cls, head_dim: int, work: torch.dtype, operands: torch.dtype) -> "Slack":
        """For K = head_dim."""
        return cls(4.0 * head_dim * torch.finfo(work).eps, torch.finfo(operands).eps)


@dataclass(frozen=True)
class Nystroem:
    """N_t = strength_t F_t w_t w_t^T, and its certificate.

    Attributes:
        w: u_t / |u_t|, zero where u_t is, [M,H,C,K].
        strength: |N_t| / F_t [M,H,C].
        phi: upper bound of |H_t - N_t|_2 / F_t, at most 1; 0 where the history is empty, [M,H,C].
    """

    w: Tensor
    strength: Tensor
    phi: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Nystroem":
        return Nystroem(change(self.w), change(self.strength), change(self.phi))


def nystroem(system: "System", operands: torch.dtype | None = None) -> Nystroem:
    """N_t and phi_t of every token of some chunks.

    Args:
        operands: dtype of H_[c] and the keys in the products; None: the working precision, as here.
    """
    relative, dtype = system.relative, system.h.dtype
    slack = Slack.of(system.h.shape[-1], dtype, operands or dtype)
    v = leading_vector(relative)
    h_v = relative.h @ v.unsqueeze(-1)  # [M,H,K,1]
    k_v = shared_matmul(v.unsqueeze(-2), relative.k.transpose(-1, -2))  # k_j . v, [M,H,1,C]
    u = shared_matmul(relative.of_keys * k_v, relative.k)
    u.addcmul_(relative.of_start.unsqueeze(-1), h_v.transpose(-1, -2))  # H_t v / F_t
    theta = (u @ v.unsqueeze(-1)).squeeze(-1)
    theta = (1.0 + slack.arithmetic + slack.operands) * theta.clamp_min(0.0) + THETA_FLOOR
    strength = u.square().sum(-1) / theta
    w = normalize(u, dim=-1, eps=torch.finfo(dtype).tiny)
    phi = remainder(relative, w, strength, slack).masked_fill(system.empty, 0.0)
    return Nystroem(w, strength, phi)


def leading_vector(relative: "Relative") -> Tensor:
    """v [M,H,K]: two power steps on S = mean_t H_t/F_t from the e_i of its largest diagonal entry."""
    start = relative.of_start.mean(-1)[..., None, None]  # [M,H,1,1]
    keys = relative.of_keys.mean(-2, keepdim=True)  # [M,H,1,C]
    diagonal = shared_matmul(keys, relative.k.square())
    diagonal += start * relative.h.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    v = one_hot(diagonal.argmax(-1), diagonal.shape[-1]).to(diagonal.dtype)  # [M,H,1,K]
    for _ in range(2):
        k_v = shared_matmul(v, relative.k.transpose(-1, -2))
        v = normalize(start * (v @ relative.h) + shared_matmul(keys * k_v, relative.k), dim=-1)
    return v.squeeze(-2)


def remainder(relative: "Relative", w: Tensor, strength: Tensor, slack: Slack) -> Tensor:
    """phi_t from the trace and the Frobenius norm of R_t = H_t - N_t (Wolkowicz and Styan, 1980).

    |R|_2 <= m + ((K - 1)/K)^(1/2) (|R|_F^2 - K m^2)^(1/2),  m = tr R / K,
    |R_t|_F^2 / F_t^2 = 1 - 2 s_t w_t^T (H_t/F_t) w_t + s_t^2,  s_t = strength.
    """
    dim = w.shape[-1]
    of_start, of_keys = relative.of_start, relative.of_keys
    along = shared_matmul(w, relative.k.transpose(-1, -2)).square_()  # (k_j . w_t)^2
    rayleigh = of_start * ((w @ relative.h) * w).sum(-1) + (of_keys * along).sum(-1)
    trace_h = relative.h.diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-1)
    mean = (of_start * trace_h + of_keys.sum(-1) - strength) / dim
    squared = 1.0 - 2.0 * strength * rayleigh + strength.square()
    spread = (1.0 - 1.0 / dim) * (squared - dim * mean.square()).clamp_min(0.0) + slack.arithmetic
    return (mean + spread.sqrt() + slack.arithmetic + slack.operands).clamp_max(1.0)
