"""The derivative of the chunk-wise map, stated once (paper: section 4.2.2 and appendix B).

Solve: y_t = p_r(A_t) dx_t, the same operator (solver "cg": A_t^-1 dx_t to the same certified error), and
with p_t = 2 a <x_t, y_t>
    dL/dH_t = -1/2 (y_t x_t^T + x_t y_t^T) - (p_t / 2) (H_t / F_t),
the last term through lambda_t = a F_t. H_t / F_t enters as `System.relative`: for a faded history
p_t / F_t ~ 1/F_t^3 overflows, while p_t (H_t / F_t) ~ 1/F_t^2 does not. Both moments share one rule.
Let P_tj be the part of <dL/dS_t, S_t> that the pair (j, t) contributes, and E the gradient of the state
at the chunk's end:
    dg_i = sum over j < i <= t of P_tj  +  the chunk-start state's part for t >= i  +  E's part.
Sums over rectangles j < i <= t replace differences of running sums, so nothing cancels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gka.maths.chunked import Chunks, Settings, Tokens
from gka.maths.grouped import group_sum, group_sum_matmul, shared_matmul, weight_shared
from gka.maths.moments import Decay, scan
from gka.maths.nonfinite import put_back_gradients, take_out, take_out_rows
from gka.maths.readout import mix
from gka.maths.ridge import System


@dataclass(frozen=True)
class Gradients:
    """Gradients of the fields of Tokens, in their shapes; None where the input was None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    h0: Tensor | None
    u0: Tensor | None


def chunk_backward(
    tokens: Tokens,
    x: Tensor | None,
    do: Tensor,
    dh_final: Tensor | None,
    du_final: Tensor | None,
    settings: Settings,
) -> Gradients:
    """Gradients of sum(o * do) + sum(h * dh_final) + sum(u * du_final).

    Args:
        tokens, settings: as given to `chunk_forward`.
        x: the solutions it returned [B,T,H,K]; None if num_iter = 0.
        do: [B,T,H,V].
        dh_final, du_final: gradients of the final states, or None for zero.
    """
    tokens, reach = take_out(tokens, settings.tied)
    tokens, x, do, rows = take_out_rows(tokens, x, do, reach)
    grads = _Backward(tokens, x, do, dh_final, du_final, settings).run()
    return put_back_gradients(grads, rows, tokens)


class _Backward:
    """One backward pass: recomputed states, adjoint solves, reverse scans, gradients block by block."""

    def __init__(
        self,
        tokens: Tokens,
        x: Tensor | None,
        do: Tensor,
        dh_final: Tensor | None,
        du_final: Tensor | None,
        settings: Settings,
    ) -> None:
        self.tokens, self.settings = tokens, settings
        self.c = c = Chunks(tokens, settings)
        self.blocks = c.blocks()
        self.x = None if x is None else c.cut(x)
        self.do = c.cut(do) * settings.scale
        self.y = None if x is None else torch.empty_like(c.q)  # the adjoint solutions
        self.dh_final, self.du_final = dh_final, du_final
        self.through_h = x is not None or dh_final is not None
        self.dq = torch.empty_like(c.q)
        self.dk, self.dv = torch.empty_like(c.k), torch.empty_like(c.v)
        self.dg_u, self.dg_h = (torch.zeros_like(c.decay_u.zeta) for _ in range(2))
        self.dalpha = None if c.alpha is None else torch.zeros_like(c.alpha)
        self.dbeta = None if c.beta is None else torch.empty_like(c.beta)

    def run(self) -> Gradients:
        c = self.c
        local_u = torch.empty_like(c.states_u[0])
        local_h = torch.zeros_like(c.states_h[0]) if self.through_h else None
        for rows in self.blocks:
            self._adjoint_solve(rows, local_u, local_h)
        ends_u, du0 = self._reverse_scan(local_u, c.decay_u, self.du_final)
        ends_h, dh0 = None, None
        if local_h is not None:
            final = self.dh_final
            if final is not None:  # H is symmetric, and so is its gradient
                final = (final + final.transpose(-1, -2)) / 2
            ends_h, dh0 = self._reverse_scan(local_h, c.decay_h, final)
        for rows in self.blocks:
            self._inputs(rows, ends_u[rows], None if ends_h is None else ends_h[rows])
        return self._collect(dh0, du0)

    def _z(self, rows: slice) -> Tensor:
        q = self.c.q[rows]
        if self.x is None:
            return q
        return mix(q, self.x[rows], None if self.c.alpha is None else self.c.alpha[rows])

    def _ridge_products(self, x: Tensor, y: Tensor) -> Tensor:
        """p_t = 2 a <x_t, y_t> [M,H,C], zero where the history is empty because x_t is zero there."""
        return 2.0 * self.settings.ridge_ratio * (x * y).sum(-1)

    def _adjoint_solve(self, rows: slice, local_u: Tensor, local_h: Tensor | None) -> None:
        """dz, dalpha, y, dq of a block, and the terms that its chunks add to the reverse scans."""
        c, do = self.c, self.do[rows]
        q, k, zeta = c.q[rows], c.k[rows], c.decay_u[rows].zeta.unsqueeze(-1)
        local_u[rows] = (zeta * self._z(rows)).transpose(-1, -2) @ do
        scores = shared_matmul(do, c.v[rows].transpose(-1, -2)) * c.weights_u(rows)
        dz = (zeta * do) @ c.states_u[0][rows].transpose(-1, -2) + shared_matmul(scores, k)
        if self.x is None or self.y is None or local_h is None:
            self.dq[rows] = dz
            return
        x, dx = self.x[rows], dz
        if c.alpha is not None and self.dalpha is not None:
            alpha = c.alpha[rows].unsqueeze(-1)
            self.dalpha[rows] = (dz * (x - q)).sum(-1)
            dx, dq = alpha * dz, (1.0 - alpha) * dz
        else:
            dq = torch.zeros_like(dz)
        system = c.system(rows)
        y = self.y[rows] = c.solve(system, dx)
        self.dq[rows] = dq + y
        local_h[rows] = self._handed_back_h(system, x, y)

    def _handed_back_h(self, system: System, x: Tensor, y: Tensor) -> Tensor:
        """sum_t zeta_t dL/dH_t [M,H,K,K]. Its ridge term is a multiple of H_[c] plus a weighted K^T K."""
        zeta, relative = system.zeta, system.relative
        zeta_p = zeta * self._ridge_products(x, y)
        outer = (zeta.unsqueeze(-1) * y).transpose(-1, -2) @ x
        of_keys = (zeta_p.unsqueeze(-2) @ relative.of_keys).squeeze(-2)
        of_start = (zeta_p * relative.of_start).sum(-1)[..., None, None] * relative.h
        weighted = weight_shared(of_keys, relative.k).transpose(-1, -2)
        ridge = of_start + shared_matmul(weighted, relative.k)
        return -0.5 * (outer + outer.transpose(-1, -2) + ridge)

    def _reverse_scan(
        self, local: Tensor, decay: Decay, final: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if final is None:
            final = local.new_zeros(self.c.layout.num_sequences, *local.shape[1:])
        return scan(local, decay.whole, final.to(local.dtype), self.c.layout, reverse=True)

    def _inputs(self, rows: slice, end_u: Tensor, end_h: Tensor | None) -> None:
        """dk, dv, dg, dgk, dbeta of a block."""
        c = self.c
        beta2 = c.beta_squared(c.decay_u)[rows]
        dk, dbeta2 = self._through_u(rows, end_u, beta2)
        if end_h is not None:
            dk_h, dbeta2_h = self._through_h(rows, end_h, beta2)
            dk, dbeta2 = dk + dk_h, dbeta2 + dbeta2_h
        self.dk[rows] = dk
        if c.beta is not None and self.dbeta is not None:
            self.dbeta[rows] = 2.0 * c.beta[rows] * dbeta2

    def _through_u(self, rows: slice, end: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients through U: returns dk [M,Hk,C,K] and d(beta^2) [M,H,C]; dv and dg are stored."""
        c, do, z = self.c, self.do[rows], self._z(rows)
        k, v, u, decay = c.k[rows], c.v[rows], c.states_u[0][rows], c.decay_u[rows]
        k_heads, v_heads = k.shape[1], v.shape[1]
        mask, zeta, to_end = decay.mask, decay.zeta, decay.to_end
        weights = mask * beta2.unsqueeze(-2)
        z_k = shared_matmul(z, k.transpose(-1, -2))
        do_v = shared_matmul(do, v.transpose(-1, -2))
        end_v = shared_matmul(end, v.transpose(-1, -2)).transpose(-1, -2)  # rows E v_j
        end_k = shared_matmul(end.transpose(-1, -2), k.transpose(-1, -2)).transpose(-1, -2)
        at_end = (beta2 * to_end).unsqueeze(-1)
        self.dv[rows] = group_sum_matmul(weights * z_k, do, v_heads) + group_sum(
            at_end * end_k, v_heads
        )
        dk = group_sum_matmul(weights * do_v, z, k_heads) + group_sum(at_end * end_v, k_heads)
        pairs = mask * z_k * do_v
        ends = to_end * _row_dots(k, end_v)
        start = zeta * ((z @ u) * do).sum(-1)
        whole = decay.whole * (u * end).sum((-2, -1))
        self.dg_u[rows] = _decay_gradient(pairs, ends, start, whole, beta2)
        return dk, pairs.sum(-2) + ends

    def _through_h(self, rows: slice, end: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients through H: returns dk [M,Hk,C,K] and d(beta^2) [M,H,C]; dgk is stored."""
        c = self.c
        k, h, decay = c.k[rows], c.states_h[0][rows], c.decay_h[rows]
        mask, to_end = decay.mask, decay.to_end
        end_k = shared_matmul(end, k.transpose(-1, -2)).transpose(-1, -2)  # rows E k_j
        dk = group_sum((2.0 * beta2 * to_end).unsqueeze(-1) * end_k, k.shape[1])
        ends = to_end * _row_dots(k, end_k)
        pairs, start = torch.zeros_like(mask), torch.zeros_like(to_end)
        if self.x is not None and self.y is not None:
            x, y, system = self.x[rows], self.y[rows], c.system(rows)
            p, fro = self._ridge_products(x, y), system.energy_divisor
            x_k = shared_matmul(x, system.k_t)
            y_k = shared_matmul(y, system.k_t)
            dk = dk - self._dk_solve(system, x, y, x_k, y_k) - self._dk_ridge(system, p)
            h_energies = system.zeta.unsqueeze(-1) * system.energies.unsqueeze(-2)
            h_energies = (h_energies + system.pair_energies) / fro.unsqueeze(
                -1
            )  # k_j^T H_t k_j / F_t
            pairs = -mask * (x_k * y_k + 0.5 * p.unsqueeze(-1) * h_energies)
            inner = system.zeta * system.h_norm_squared.unsqueeze(-1)  # <H_[c], H_t>
            inner = inner + (system.weights @ system.energies.unsqueeze(-1)).squeeze(-1)
            start = -system.zeta * (((x @ h) * y).sum(-1) + 0.5 * p * (inner / fro))
        whole = decay.whole * (h * end).sum((-2, -1))
        self.dg_h[rows] = _decay_gradient(pairs, ends, start, whole, beta2)
        return dk, pairs.sum(-2) + ends

    def _dk_solve(self, system: System, x: Tensor, y: Tensor, x_k: Tensor, y_k: Tensor) -> Tensor:
        """beta_j^2 sum_t M_jt (y_t (x_t . k_j) + x_t (y_t . k_j)), summed over the heads that share a key."""
        shared = system.k.shape[1]
        return group_sum_matmul(system.weights * x_k, y, shared) + group_sum_matmul(
            system.weights * y_k, x, shared
        )

    def _dk_ridge(self, system: System, p: Tensor) -> Tensor:
        """beta_j^2 sum_t M_jt (p_t / F_t) H_t k_j: a multiple of H_[c] k_j plus a full C x C mask on keys."""
        weights, k, relative = system.weights, system.k, system.relative
        full = weights.transpose(-1, -2) @ (p.unsqueeze(-1) * relative.of_keys)
        of_keys = group_sum(full, k.shape[1]) * (k @ relative.k.transpose(-1, -2))
        of_start = ((p * relative.of_start).unsqueeze(-2) @ weights).squeeze(-2)
        h_k = shared_matmul(relative.h, system.k_t).transpose(-1, -2)
        return of_keys @ relative.k + group_sum(of_start.unsqueeze(-1) * h_k, k.shape[1])

    def _collect(self, dh0: Tensor | None, du0: Tensor) -> Gradients:
        c, t = self.c, self.tokens
        dg, dgk = c.join(self.dg_u), c.join(self.dg_h)
        if self.settings.tied:
            dg = dg + dgk
        if t.h0 is not None and dh0 is None:
            dh0 = torch.zeros_like(t.h0)

        def like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
            return None if x is None or grad is None else grad.to(x.dtype).contiguous()

        return Gradients(
            q=c.join(self.dq).to(t.q.dtype).contiguous(),
            k=c.join(self.dk).to(t.k.dtype).contiguous(),
            v=c.join(self.dv).to(t.v.dtype).contiguous(),
            g=like(dg, t.g),
            gk=like(dgk, t.gk),
            alpha=like(None if self.dalpha is None else c.join(self.dalpha), t.alpha),
            beta=like(None if self.dbeta is None else c.join(self.dbeta), t.beta),
            h0=like(dh0, t.h0),
            u0=like(du0, t.u0),
        )


def _row_dots(shared: Tensor, b: Tensor) -> Tensor:
    """shared_j . b_j for rows of shared heads [M,Hk,C,K] and of all heads [M,H,C,K] -> [M,H,C]."""
    grouped = b.unflatten(1, (shared.shape[1], b.shape[1] // shared.shape[1]))
    return (grouped * shared.unsqueeze(2)).sum(-1).flatten(1, 2)


def _decay_gradient(
    pairs: Tensor, ends: Tensor, start: Tensor, whole: Tensor, beta2: Tensor
) -> Tensor:
    """dg_i [M,H,C] by the rule at the top of this file.

    Args:
        pairs: P_tj / beta_j^2 [M,H,C,C]. ends: E's part for each j, divided by beta_j^2, [M,H,C].
        start: the chunk-start state's part of each t [M,H,C]. whole: that state's part in E [M,H].
        beta2: beta_j^2 [M,H,C].
    """
    after = (
        (pairs * beta2.unsqueeze(-2)).flip(-2).cumsum(-2).flip(-2)
    )  # sum over t >= i, for each j
    rectangles = after.tril(-1).sum(-1)  # row i: over j < i
    # a sum of the earlier terms: a full sum minus its last term would keep that term's rounding
    before_end = pad((ends * beta2)[..., :-1].cumsum(-1), (1, 0))
    return rectangles + before_end + start.flip(-1).cumsum(-1).flip(-1) + whole.unsqueeze(-1)
