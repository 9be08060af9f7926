"""Chebyshev iteration for (H_t + lambda_t I) x_t = q_t (paper: section 4.1, algorithm 1).

The eigenvalues of A_t = H_t + lambda_t I lie in [lambda_t, lambda_t + F_t] with lambda_t = a F_t,
so rho = (L - mu)/(L + mu) = 1/(1 + 2a) and the weights omega_i are the same for every token.
"""

from collections.abc import Callable

from torch import Tensor


def chebyshev_weights(ridge_ratio: float, num_iter: int) -> list[float]:
    """omega_1 .. omega_r of omega_i = 4 / (4 - rho^2 omega_{i-1}), omega_0 = 2, rho = 1/(1 + 2a)."""
    rho = 1.0 / (1.0 + 2.0 * ridge_ratio)
    weights = [2.0]
    for _ in range(num_iter):
        weights.append(4.0 / (4.0 - rho * rho * weights[-1]))
    return weights[1:]


def chebyshev_bound(ridge_ratio: float, num_iter: int) -> float:
    """2 R^(r+1), the bound on |x_r - x*|_A / |x*|_A, R = (sqrt(kappa) - 1)/(sqrt(kappa) + 1).

    kappa = (1 + a)/a is the largest condition number that lambda_t = a F_t allows.
    """
    root = ((1.0 + ridge_ratio) / ridge_ratio) ** 0.5
    return 2.0 * ((root - 1.0) / (root + 1.0)) ** (num_iter + 1)


def chebyshev_solve(
    apply_h: Callable[[Tensor], Tensor], q: Tensor, fro: Tensor, ridge_ratio: float, num_iter: int
) -> Tensor:
    """x_r = p_r(A) q by `num_iter` steps of the residual form (Saad, Iterative Methods, alg. 12.1).

    The same polynomial as the three-term recursion in x; it keeps the residual r and the update d,
    r -= A d,  d = (omega_i - 1) d + (2 omega_i/(L + mu)) r,  x += d,
    which rounds better where the product takes 16-bit operands (docs/numerics.md).

    Args:
        apply_h: the product with H_t of every row of its argument, [..., K] -> [..., K].
        q: right-hand sides [..., K].
        fro: F_t > 0, [...]. Rows of an empty history must come with q = 0 and any positive F_t.
        ridge_ratio: a in lambda_t = a F_t.
        num_iter: r >= 1.

    Returns:
        x [..., K] in q's dtype.
    """
    fro = fro.unsqueeze(-1)
    step = 2.0 / ((1.0 + 2.0 * ridge_ratio) * fro)  # 2/(L + mu)
    lamb = ridge_ratio * fro
    residual = q.clone()
    d = step * q
    x = d.clone()
    for omega in chebyshev_weights(ridge_ratio, num_iter):
        residual = residual - (apply_h(d) + lamb * d)
        d = (omega - 1.0) * d + (omega * step) * residual
        x = x + d
    return x


def chebyshev_solve_(
    apply_h: Callable[[Tensor], Tensor], q: Tensor, fro: Tensor, ridge_ratio: float, num_iter: int
) -> Tensor:
    """`chebyshev_solve` with its three arrays updated in place; not differentiable, `q` untouched.

    `apply_h` may return a buffer of its own: it is read before the next call.
    """
    fro = fro.unsqueeze(-1)
    step = 2.0 / ((1.0 + 2.0 * ridge_ratio) * fro)
    lamb = ridge_ratio * fro
    residual = q.clone()
    d = step * q
    x = d.clone()
    for omega in chebyshev_weights(ridge_ratio, num_iter):
        residual.sub_(apply_h(d)).addcmul_(lamb, d, value=-1.0)
        d.mul_(omega - 1.0).addcmul_(step, residual, value=omega)
        x.add_(d)
    return x
