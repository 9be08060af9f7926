"""The adaptive solver: per chunk the fewest steps whose proven error is that of num_iter plain ones.

With `nystroem`'s P_t the eigenvalues of P_t^-1 A_t lie in [1, kappa] for all tokens of a chunk,
    kappa = 1 + phi/a <= (1 + a)/a,  phi = max_t phi_t,
    n = ceil((r + 1) acosh(1 + 2a)/acosh(1 + 2a/phi)) - 1 steps,
or r plain steps (N_t = 0, phi = 1) where n > 5r/6. Chebyshev iteration on P_t^-1 A_t is the residual
form with P_t^-1 r_t in r_t's place. The map q_t -> x_t stays linear and symmetric, p(P^-1 A) P^-1,
so the adjoint solve is the same solve.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gka.maths.chebyshev import chebyshev_solve_, iterate_
from gka.maths.nystroem import Nystroem, nystroem

if TYPE_CHECKING:
    from gka.maths.system import Products, System


# A step with N_t costs about a sixth more than a plain one (CPU); chunks that save less run plain.
WORTHWHILE = 5.0 / 6.0


def arcosh_1p(x: Tensor) -> Tensor:
    """acosh(1 + x), accurate for small x too."""
    return torch.log1p(x + (x * (x + 2.0)).sqrt())


def steps(phi: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """Fewest n with 1/T_{n+1}(1 + 2a/phi) <= 1/T_{r+1}(1 + 2a), and r where n > 5r/6 (plain steps).

    int64 [...], of float64 phi [...].
    """
    a = torch.full_like(phi, ridge_ratio)
    ratio = arcosh_1p(2.0 * a) / arcosh_1p(2.0 * a / phi)
    n = ((num_iter + 1) * ratio).ceil().sub(1.0).clamp_min(0.0)
    return n.where(n <= WORTHWHILE * num_iter, torch.full_like(n, num_iter)).long()


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
    """The plan (see `chebyshev.Plan`) of some chunks; each stands still after its own n.

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
    def of(cls, part: Nystroem, fro: Tensor, ridge_ratio: float, num_iter: int) -> "Adaptive":
        """Where n = r the chunk runs plain: N_t = 0, kappa = (1 + a)/a."""
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

    def leading(self, rows: int) -> "Adaptive":
        """The plan of the first M' = rows chunks."""
        return Adaptive(
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
    """The pairs (chunk, key head) as rows of their own: the plain ones first, then by falling steps.

    Attributes:
        plain: how many rows run r plain steps in all their heads.
        longest: steps of each of the other rows, falling.
    """

    def __init__(self, counts: Tensor, key_heads: int, num_iter: int) -> None:
        """Of n [M,H] of each chunk and head, r = num_iter."""
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
        """(rows still at work, their steps) from the first step to the last."""
        ends = sorted({0, *self.longest})
        return [
            (sum(n > a for n in self.longest), range(a + 1, b + 1))
            for a, b in itertools.pairwise(ends)
        ]


def adaptive_solve(system: "System", q: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """x_t [M,H,C,K] of the systems of some chunks, q zero where the history is empty."""
    part = nystroem(system)
    counts = steps(part.phi.amax(-1).double(), ridge_ratio, num_iter)
    units = Units(counts, system.k.shape[1], num_iter)
    q, fro, products = units.take(q), units.take(system.fro), system.products.map(units.take)
    part, x, p = part.map(units.take), torch.empty_like(q), units.plain
    if p > 0:
        plain = products.map(lambda y: y[:p])
        x[:p] = chebyshev_solve_(plain, q[:p], fro[:p], ridge_ratio, num_iter)
    if units.longest:
        plan = Adaptive.of(part.map(lambda y: y[p:]), fro[p:], ridge_ratio, num_iter)
        x[p:] = plan.first(q[p:])
        lamb = ridge_ratio * fro[p:].unsqueeze(-1)
        _iterate(products.map(lambda y: y[p:]), lamb, plan, q[p:], x[p:], units.spans())
    return units.put(x)


def _iterate(
    products: "Products",
    lamb: Tensor,
    plan: Adaptive,
    q: Tensor,
    x: Tensor,
    spans: list[tuple[int, range]],
) -> None:
    """x_0 -> x_n in place: each span of steps on the rows that are still at work."""
    residual, d = q.clone(), x.clone()
    for rows, span in spans:
        iterate_(
            products.map(lambda y, rows=rows: y[:rows]), lamb[:rows], plan.leading(rows),
            residual[:rows], d[:rows], x[:rows], span,
        )  # fmt: skip


def solver_steps(system: "System", ridge_ratio: float, num_iter: int) -> Tensor:
    """n of each chunk and head, int64 [M,H]."""
    return steps(nystroem(system).phi.amax(-1).double(), ridge_ratio, num_iter)
