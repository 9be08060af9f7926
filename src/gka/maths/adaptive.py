"""The adaptive solver: per chunk the fewest steps whose proven error is that of num_iter plain ones.

One direction is taken out of every H_t, and the norm of what is left is certified (proofs:
docs/numerics.md). With one unit vector v for the chunk,
    u_t = H_t v,  theta_t = v^T u_t,  N_t = u_t u_t^T / theta_t <= H_t      rank-one Nystroem part
    P_t = lambda_t I + N_t <= A_t,  R_t = H_t - N_t >= 0,  |R_t|_2 <= phi_t F_t
    the eigenvalues of P_t^-1 A_t lie in [1, kappa],  kappa = 1 + phi/a,  phi = max_t phi_t <= 1
    n = ceil((r + 1) acosh(1 + 2a)/acosh(1 + 2a/phi)) - 1                   steps of the whole chunk
Chebyshev iteration on P_t^-1 A_t is the residual form with P_t^-1 r_t in r_t's place. The map
q_t -> x_t stays linear and symmetric, p(P^-1 A) P^-1, so the adjoint solve is the same solve.
Everything is relative to |H_[c]|, |k_j| and F_t: no size of H_t leaves the range of the precision.
"""

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


def arcosh_1p(x: Tensor) -> Tensor:
    """acosh(1 + x), accurate for small x too."""
    return torch.log1p(x + (x * (x + 2.0)).sqrt())


def steps(phi: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """Fewest n <= r with 1/T_{n+1}(1 + 2a/phi) <= 1/T_{r+1}(1 + 2a): int64 [...], of float64 phi."""
    a = torch.full_like(phi, ridge_ratio)
    ratio = arcosh_1p(2.0 * a) / arcosh_1p(2.0 * a / phi)
    return ((num_iter + 1) * ratio).ceil().sub(1.0).clamp(0.0, num_iter).long()


def weights(phi: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """omega_1 .. omega_n for sigma = 1 + 2a/phi: [n, ...] of float64 phi [...].

    omega_i = 2 sigma T_i(sigma)/T_{i+1}(sigma), with T_i(cosh s) = cosh(i s) and e = exp(-2s).
    """
    e = torch.exp(-2.0 * arcosh_1p(2.0 * ridge_ratio / phi))
    i = torch.arange(1, num_iter + 1, dtype=phi.dtype, device=phi.device)
    i = i.view(-1, *(1 for _ in phi.shape))
    return (1.0 + e) * (1.0 + e**i) / (1.0 + e ** (i + 1.0))


@dataclass(frozen=True)
class Adaptive:
    """The plan (see `chebyshev.Plan`) of some chunks together; each stands still after its own n.

    Attributes:
        counts: n of each chunk and head, int64 [M,H].
        num_iter: the largest of them.
        step: 2/((kappa + 1) lambda_t) [M,H,C,1].
        taken: tau_t^1/2 w_t in P_t^-1 r = (r - tau_t (w_t . r) w_t)/lambda_t, [M,H,C,K].
        keep, gain: omega_i - 1 and omega_i, zero from i = n + 1 on, [num_iter,M,H,1,1].
    """

    counts: Tensor
    num_iter: int
    step: Tensor
    taken: Tensor
    keep: Tensor
    gain: Tensor

    @classmethod
    def of(cls, system: "System", ridge_ratio: float, num_iter: int) -> "Adaptive":
        """Where no step is saved the chunk runs plain: N_t = 0, kappa = (1 + a)/a."""
        part, fro = nystroem(system), system.fro
        phi = part.phi.amax(-1).double()
        counts = steps(phi, ridge_ratio, num_iter)
        plain = counts == num_iter
        phi = phi.masked_fill(plain, 1.0)
        tau = part.strength / (ridge_ratio + part.strength)
        tau = tau.masked_fill(plain.unsqueeze(-1), 0.0)
        longest = int(counts.max()) if counts.numel() else 0
        omega = weights(phi, ridge_ratio, longest).to(fro.dtype)
        alive = torch.arange(1, longest + 1, device=fro.device)[:, None, None] <= counts
        factor = (2.0 / (phi + 2.0 * ridge_ratio)).to(fro.dtype)  # 2/((kappa + 1) a)
        return cls(
            counts=counts,
            num_iter=longest,
            step=(factor.unsqueeze(-1) / fro).unsqueeze(-1),
            taken=tau.sqrt().unsqueeze(-1) * part.w,
            keep=((omega - 1.0) * alive)[..., None, None],
            gain=(omega * alive)[..., None, None],
        )

    def first(self, q: Tensor) -> Tensor:
        return self.step * torch.addcmul(q, self._along(q), self.taken, value=-1.0)

    def next_(self, d: Tensor, residual: Tensor, i: int) -> None:
        gain = self.gain[i - 1] * self.step
        d.mul_(self.keep[i - 1]).addcmul_(gain, residual)
        d.addcmul_(gain * self._along(residual), self.taken, value=-1.0)

    def _along(self, x: Tensor) -> Tensor:
        return torch.linalg.vecdot(x, self.taken).unsqueeze(-1)
