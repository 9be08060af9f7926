"""What num_iter steps cost, bounded term by term.

The Chebyshev solve leaves x_r = x* - R(A) x* with a residual polynomial R that is at most
eps = 2 R^(r+1) on the spectrum of the symmetric A, so |x_r - x*| <= eps |x*| and, for the adjoint solve,
|y_r - y*| <= eps |y*| in the 2-norm. Everything else in the map is exact. The triangle inequality carries
these two through the output and every gradient; nothing here is measured and then written down.
"""

import pytest
import torch
from torch import Tensor

from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.maths.solvers.exact import exact_solve
from problems import Problem, chunkwise, differentiate, make_problem, oracle, reference, upstream
from tolerances import assert_close


def norm(x: Tensor, dims: int = 1) -> Tensor:
    return x.square().sum(tuple(range(-dims, 0))).sqrt()


def shared(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


def group_sum(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).sum(3)


class Bounds:
    """Bounds of |error| per token (per state for h0 and u0) of one unpacked problem with all gates."""

    def __init__(self, problem: Problem, ridge_ratio: float, eps: float) -> None:
        self.p, self.eps = problem, eps
        assert problem.g is not None and problem.gk is not None and problem.alpha is not None
        assert problem.beta is not None and problem.h0 is not None and problem.u0 is not None
        self.gamma_u, self.gamma_h = problem.g.exp(), problem.gk.exp()
        self.alpha, self.beta = problem.alpha, problem.beta
        heads = problem.q.shape[2]
        self.k, self.v = shared(problem.k, heads), shared(problem.v, heads)
        keys, values = self.beta.unsqueeze(-1) * self.k, self.beta.unsqueeze(-1) * self.v
        self.h = self.states(problem.h0, self.gamma_h, keys, keys)  # [B,T+1,H,K,K], initial first
        self.u = self.states(problem.u0, self.gamma_u, keys, values)
        self.do = upstream(oracle(problem))[0]
        self.dz = torch.einsum("bthkv,bthv->bthk", self.u[:, 1:], self.do)
        lamb = ridge_ratio * norm(self.h[:, 1:], 2)
        self.x = norm(exact_solve(self.h[:, 1:], problem.q, lamb))
        self.y = norm(exact_solve(self.h[:, 1:], self.alpha.unsqueeze(-1) * self.dz, lamb))
        # errors of dL/dH_t and dL/dU_t, then of their decayed sums over t >= i
        product = (2 * eps + eps * eps) * self.x * self.y
        self.of_h = self.sums((1 + ridge_ratio) * product, self.gamma_h)
        self.of_u = self.sums(self.alpha * eps * self.x * norm(self.do), self.gamma_u)

    @staticmethod
    def states(start: Tensor, gamma: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = [start]
        for t in range(k.shape[1]):
            outer = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            states.append(gamma[:, t, :, None, None] * states[-1] + outer)
        return torch.stack(states, 1)

    @staticmethod
    def sums(errors: Tensor, gamma: Tensor) -> Tensor:
        total, sums = torch.zeros_like(errors[:, 0]), []
        for t in reversed(range(errors.shape[1])):
            total = errors[:, t] + total
            sums.append(total)
            total = gamma[:, t] * total
        return torch.stack(sums[::-1], 1)

    def all(self) -> dict[str, Tensor]:
        p, beta = self.p, self.beta
        k, v = norm(self.k), norm(self.v)
        written_k = 2 * beta * k * self.of_h + beta * v * self.of_u  # of the gradient of beta k
        written_v = beta * k * self.of_u
        faded_h = self.gamma_h * norm(self.h[:, :-1], 2)
        faded_u = self.gamma_u * norm(self.u[:, :-1], 2)
        return {
            "o": norm(self.u[:, 1:], 2) * self.alpha * self.eps * self.x,
            "q": self.eps * self.y,
            "alpha": self.eps * self.x * norm(self.dz),
            "k": group_sum(beta * written_k, p.k.shape[2]),
            "v": group_sum(beta * written_v, p.v.shape[2]),
            "beta": k * written_k + v * written_v,
            "g": faded_u * self.of_u,
            "gk": faded_h * self.of_h,
            "h0": self.gamma_h[:, 0] * self.of_h[:, 0],
            "u0": self.gamma_u[:, 0] * self.of_u[:, 0],
        }


@pytest.mark.parametrize(
    ("num_iter", "ridge_ratio"), [(5, 0.02), (15, 0.02), (30, 0.02), (30, 0.005), (6, 0.5)]
)
def test_error_of_output_and_gradients_is_within_the_truncation(num_iter, ridge_ratio):
    """Output and all ten gradients at r steps lie within the bound that 2 R^(r+1) implies, token by token."""
    problem = make_problem(70, (4, 2, 1), (16, 8), decay="separate")
    bounds = Bounds(problem, ridge_ratio, chebyshev_bound(ridge_ratio, num_iter)).all()
    exact, exact_grads = differentiate(oracle, problem, ridge_ratio=ridge_ratio)
    found, grads = differentiate(
        chunkwise, problem, ridge_ratio=ridge_ratio, num_iter=num_iter, chunk_size=16
    )
    pairs = {"o": (found[0], exact[0])} | {n: (grads[n], exact_grads[n]) for n in exact_grads}
    assert pairs.keys() == bounds.keys()
    for name, (x, y) in pairs.items():
        dims = x.dim() - bounds[name].dim()
        error = norm(x - y, dims) if dims else (x - y).abs()
        assert (error <= bounds[name] + 1e-12).all(), name
        # not vacuous: something comes within three orders of magnitude of it
        assert (error / bounds[name].clamp_min(1e-30)).max() > 1e-3, name


def test_gradient_of_q_is_the_derivative_of_the_truncated_map():
    """dq is that of the computed polynomial, at any number of steps: it equals autograd through them."""
    problem = make_problem(70, (2, 1, 2), (8, 6))
    for num_iter in (1, 4, 30):
        _, grads = differentiate(chunkwise, problem, num_iter=num_iter)
        _, traced = differentiate(reference, problem, num_iter=num_iter)
        assert_close(grads["q"], traced["q"], 1e-12, f"dq at {num_iter} steps")
