"""The adaptive solver: per chunk the fewest steps with the proven error bound of num_iter plain steps.

With one unit vector v per chunk, N_t is the rank-one Nystroem part of H_t and phi_t F_t bounds the rest:
    u_t = H_t v,  theta_t = v^T u_t,  N_t = u_t u_t^T / theta_t <= H_t,
    R_t = H_t - N_t >= 0,  |R_t|_2 <= phi_t F_t,  P_t = lambda_t I + N_t <= A_t
(proofs: docs/numerics.md). All quantities are relative to |H_[c]|, |k_j| and F_t, so none overflows or
underflows, whatever the size of H_t. For all tokens of a chunk the eigenvalues of P_t^-1 A_t lie in
[1, kappa],
    kappa = 1 + phi/a <= (1 + a)/a,  phi = max_t phi_t,
    n = ceil((r + 1) acosh(1 + 2a)/acosh(1 + 2a/phi)) - 1 steps,
or r plain steps (N_t = 0, phi = 1) where n > 5r/6. Chebyshev iteration on P_t^-1 A_t is the residual
form with P_t^-1 r_t in place of r_t. The map q_t -> x_t stays linear and symmetric, p(P^-1 A) P^-1,
so the adjoint solve is the same solve.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from gka.maths.grouped import shared_matmul
from gka.maths.ridge import Products, Relative, System
from gka.maths.solvers.chebyshev import chebyshev_solve_, iterate_

# Share of F_t added to theta_t: if v is (nearly) orthogonal to H_t, u_t is rounding and N_t must vanish.
THETA_FLOOR = 2.0**-10
# A step with N_t costs about a sixth more than a plain one (CPU). Chunks that save less take plain steps.
WORTHWHILE = (5, 6)


@dataclass(frozen=True)
class Slack:
    """The certificate's allowances for rounding (docs/numerics.md).

    Attributes:
        arithmetic: 8 K u, u the unit roundoff of the working precision. Bounds the error of
            |R_t|_F^2 / F_t^2, a sum of four terms of size 1 from inner products of length K.
        operands: 2 u of the dtype in which the solve's products hold H_[c] and the keys. Bounds what
            that rounding adds to |R_t|_2 / F_t.
    """

    arithmetic: float
    operands: float

    @classmethod
    def of(cls, head_dim: int, work: torch.dtype, operands: torch.dtype) -> "Slack":
        """The allowances for K = head_dim."""
        return cls(4.0 * head_dim * torch.finfo(work).eps, torch.finfo(operands).eps)


@dataclass(frozen=True)
class Nystroem:
    """N_t = strength_t F_t w_t w_t^T, and its certificate.

    Attributes:
        w: u_t / |u_t|, zero for u_t = 0, [M,H,C,K].
        strength: |N_t| / F_t [M,H,C].
        phi: upper bound of |H_t - N_t|_2 / F_t, at most 1; 0 where the history is empty, [M,H,C].
    """

    w: Tensor
    strength: Tensor
    phi: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Nystroem":
        return Nystroem(change(self.w), change(self.strength), change(self.phi))


def nystroem(system: System, operands: torch.dtype | None = None) -> Nystroem:
    """N_t and phi_t of every token of some chunks.

    Args:
        operands: dtype of H_[c] and the keys in the solve's products; None: the working precision.
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


def leading_vector(relative: Relative) -> Tensor:
    """v [M,H,K]: two power steps on S = mean_t H_t/F_t from the unit vector e_i of its largest S_ii."""
    start = relative.of_start.mean(-1)[..., None, None]  # [M,H,1,1]
    keys = relative.of_keys.mean(-2, keepdim=True)  # [M,H,1,C]
    diagonal = shared_matmul(keys, relative.k.square())
    diagonal += start * relative.h.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    v = one_hot(diagonal.argmax(-1), diagonal.shape[-1]).to(diagonal.dtype)  # [M,H,1,K]
    for _ in range(2):
        k_v = shared_matmul(v, relative.k.transpose(-1, -2))
        v = normalize(start * (v @ relative.h) + shared_matmul(keys * k_v, relative.k), dim=-1)
    return v.squeeze(-2)


def remainder(relative: Relative, w: Tensor, strength: Tensor, slack: Slack) -> Tensor:
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
    """Fewest n with 1/T_{n+1}(1 + 2a/phi) <= 1/T_{r+1}(1 + 2a); r plain steps where n > 5r/6.

    phi is float64 [...], the result int64 [...].
    """
    a = torch.full_like(phi, ridge_ratio)
    ratio = arcosh_1p(2.0 * a) / arcosh_1p(2.0 * a / phi)
    n = ((num_iter + 1) * ratio).ceil().sub(1.0).clamp_min(0.0)
    return n.where(
        n <= WORTHWHILE[0] / WORTHWHILE[1] * num_iter, torch.full_like(n, num_iter)
    ).long()


def weights(phi: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """omega_1 .. omega_n for sigma = 1 + 2a/phi: [n, ...] for float64 phi [...].

    omega_i = 2 sigma T_i(sigma)/T_{i+1}(sigma), with T_i(cosh s) = cosh(i s) and e = exp(-2s).
    """
    e = torch.exp(-2.0 * arcosh_1p(2.0 * ridge_ratio / phi))
    i = torch.arange(1, num_iter + 1, dtype=phi.dtype, device=phi.device)
    i = i.view(-1, *(1 for _ in phi.shape))
    return (1.0 + e) * (1.0 + e**i) / (1.0 + e ** (i + 1.0))


@dataclass(frozen=True)
class AdaptivePlan:
    """The plan (see `chebyshev.Plan`) of some chunks; each stops after its own n steps.

    Attributes:
        step: 2/((kappa + 1) lambda_t) [M,H,C,1].
        taken: tau_t^1/2 w_t in P_t^-1 r = (r - tau_t (w_t . r) w_t)/lambda_t, [M,H,C,K].
        keep, gain: omega_i - 1 and omega_i, zero from i = n + 1 on, [longest n,M,H,1,1].
    """

    step: Tensor
    taken: Tensor
    keep: Tensor
    gain: Tensor

    @classmethod
    def of(cls, part: Nystroem, fro: Tensor, ridge_ratio: float, num_iter: int) -> "AdaptivePlan":
        """The plan of chunks with this N_t. A chunk with n = r runs plain: N_t = 0, kappa = (1 + a)/a."""
        phi = part.phi.amax(-1).double()
        counts = steps(phi, ridge_ratio, num_iter)
        plain = counts == num_iter
        phi = phi.masked_fill(plain, 1.0)
        tau = part.strength / (ridge_ratio + part.strength)
        tau = tau.masked_fill(plain.unsqueeze(-1), 0.0)
        longest = int(counts.max()) if counts.numel() > 0 else 0
        omega = weights(phi, ridge_ratio, longest).to(fro.dtype)
        alive = torch.arange(1, longest + 1, device=fro.device)[:, None, None] <= counts
        factor = (2.0 / (phi + 2.0 * ridge_ratio)).to(fro.dtype)  # 2/((kappa + 1) a)
        return cls(
            step=(factor.unsqueeze(-1) / fro).unsqueeze(-1),
            taken=tau.sqrt().unsqueeze(-1) * part.w,
            keep=((omega - 1.0) * alive)[..., None, None],
            gain=(omega * alive)[..., None, None],
        )

    def leading(self, rows: int) -> "AdaptivePlan":
        """The plan of the first M' = rows chunks."""
        return AdaptivePlan(
            self.step[:rows], self.taken[:rows], self.keep[:, :rows], self.gain[:, :rows]
        )

    def first(self, q: Tensor) -> Tensor:
        return self.step * torch.addcmul(q, self._along(q), self.taken, value=-1.0)

    def next_(self, d: Tensor, residual: Tensor, i: int) -> None:
        gain = self.gain[i - 1] * self.step
        d.mul_(self.keep[i - 1]).addcmul_(gain, residual)
        d.addcmul_(gain * self._along(residual), self.taken, value=-1.0)

    def _along(self, x: Tensor) -> Tensor:
        return torch.linalg.vecdot(x, self.taken).unsqueeze(-1)


class Units:
    """The pairs (chunk, key head) as rows: the plain ones first, the others sorted by steps, most first.

    Attributes:
        plain: number of rows that run r plain steps in all their heads.
        longest: steps of each of the other rows, in descending order.
    """

    def __init__(self, counts: Tensor, key_heads: int, num_iter: int) -> None:
        """Sort by n [M,H], the steps of each chunk and head; r = num_iter."""
        self.key_heads, self.chunks = key_heads, counts.shape[0]
        grouped = counts.unflatten(1, (key_heads, -1)).flatten(0, 1)  # [U,H/Hk]
        plain = (grouped == num_iter).all(-1)
        longest = grouped.amax(-1) + plain  # r + 1 for the plain ones
        self.order = longest.argsort(descending=True, stable=True)
        self.plain = int(plain.sum())
        self.longest: list[int] = longest[self.order].tolist()[self.plain :]

    def take(self, x: Tensor) -> Tensor:
        """[M,H,...] -> [U,H/Hk,...]; keys [M,Hk,...] -> [U,1,...]."""
        return x.unflatten(1, (self.key_heads, -1)).flatten(0, 1)[self.order]

    def put(self, x: Tensor) -> Tensor:
        """The inverse of `take`."""
        out = torch.empty_like(x)
        out[self.order] = x
        return out.unflatten(0, (self.chunks, self.key_heads)).flatten(1, 2)

    def spans(self) -> list[tuple[int, range]]:
        """(number of active rows, range of steps) from the first step to the last."""
        ends = sorted({0, *self.longest})
        return [
            (sum(n > a for n in self.longest), range(a + 1, b + 1))
            for a, b in itertools.pairwise(ends)
        ]


def _iterate(
    products: Products,
    lamb: Tensor,
    plan: AdaptivePlan,
    q: Tensor,
    x: Tensor,
    spans: list[tuple[int, range]],
) -> None:
    """x_0 -> x_n in place: each span of steps on the rows that are still active."""
    residual, d = q.clone(), x.clone()
    for rows, span in spans:
        iterate_(
            products.map(lambda y, rows=rows: y[:rows]), lamb[:rows], plan.leading(rows),
            residual[:rows], d[:rows], x[:rows], span,
        )  # fmt: skip


@dataclass(frozen=True)
class Adaptive:
    """The fewest steps per chunk and head with the error bound of num_iter plain ones; a = ridge_ratio."""

    adaptive: ClassVar[bool] = True
    ridge_ratio: float
    num_iter: int

    def solve(self, system: System, q: Tensor) -> Tensor:
        """x_t = p_n(P_t^-1 A_t) P_t^-1 q_t [M,H,C,K] of some chunks, zero where the history is empty."""
        a, r = self.ridge_ratio, self.num_iter
        q = q.masked_fill(system.empty.unsqueeze(-1), 0.0)
        part = nystroem(system)
        counts = steps(part.phi.amax(-1).double(), a, r)
        units = Units(counts, system.k.shape[1], r)
        q, fro, products = units.take(q), units.take(system.fro), system.products.map(units.take)
        part, x, p = part.map(units.take), torch.empty_like(q), units.plain
        if p > 0:
            plain = products.map(lambda y: y[:p])
            x[:p] = chebyshev_solve_(plain, q[:p], fro[:p], a, r)
        if units.longest:
            plan = AdaptivePlan.of(part.map(lambda y: y[p:]), fro[p:], a, r)
            x[p:] = plan.first(q[p:])
            lamb = a * fro[p:].unsqueeze(-1)
            _iterate(products.map(lambda y: y[p:]), lamb, plan, q[p:], x[p:], units.spans())
        return units.put(x)

    def solve_state(self, h: Tensor, q: Tensor) -> Tensor:
        """x [B,H,K] of states H [B,H,K,K], chunks of one token; heads that need fewer steps stop early."""
        system = System.of_state(h)
        q = q.unsqueeze(-2).masked_fill(system.empty.unsqueeze(-1), 0.0)
        plan = AdaptivePlan.of(nystroem(system), system.fro, self.ridge_ratio, self.num_iter)
        x, lamb = plan.first(q), self.ridge_ratio * system.fro.unsqueeze(-1)
        taken = range(1, plan.keep.shape[0] + 1)
        iterate_(lambda d: d @ h, lamb, plan, q.clone(), x.clone(), x, taken)
        return x.squeeze(-2)

    def steps(self, system: System, q: Tensor) -> Tensor:
        """n of each chunk and head, int64 [M,H]."""
        return steps(nystroem(system).phi.amax(-1).double(), self.ridge_ratio, self.num_iter)
