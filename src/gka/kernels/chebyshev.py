"""The Chebyshev loop on the tensor cores."""

import triton
import triton.language as tl

from gka.kernels.common import add_product, load_raw


@triton.jit
def without(residual, w_ptr, tau, heads, valid, K: tl.constexpr):
    """(1 - tau_t w_t w_t^T) r_t of every row, w of the first of `heads` at w_ptr; r where tau is None."""
    if tau is not None:
        columns = tl.arange(0, residual.shape[1])
        w = load_raw(w_ptr, 0, heads, 0, K, columns, valid).to(tl.float32)
        residual -= (tau * tl.sum(residual * w, 1))[:, None] * w
    return residual


@triton.jit
def chebyshev(
    rhs, kn, hn, h_ptr, h_coef, weight, lamb, rho2, num_iter, w_ptr, tau, w_heads, valid,
    K: tl.constexpr, TILED: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x of B_t x_t = rhs_t, B_t = 2/(L + mu) (H_t + lambda_t I), in the residual form.

    rhs [C, BK] float32 of size about one; kn [C, BK], hn [BK, BK] in OP (TILED: at h_ptr); h_coef [C] and
    weight [C, C] carry 2/(L + mu); lamb = 2a/(1 + 2a). The update d is rounded to OP before it
    enters both x and the residual, so rounding it costs no accuracy. With tau (else None) the residual
    that updates d is (1 - tau_t w_t w_t^T) times it, and 2/((kappa + 1) lambda) stands for 2/(L + mu).
    """
    residual = rhs
    d = without(rhs, w_ptr, tau, w_heads, valid, K).to(OP)
    x = d.to(tl.float32)
    kt = tl.trans(kn)
    minus_weight = (-weight).to(OP)
    omega = 2.0
    for i in range(num_iter):
        omega = 4.0 / (4.0 - rho2 * omega)
        d32 = d.to(tl.float32)
        scaled = (d32 * (-h_coef)[:, None]).to(OP)
        # an address that is not the same in every step: tiles read once for all would not fit
        again = h_ptr + i // 1073741824
        residual = add_product(residual, scaled, hn, again, K, TILED, False, PREC)
        scores = tl.dot(d, kt, input_precision=PREC) * minus_weight.to(tl.float32)
        residual = tl.dot(scores.to(OP), kn, residual, input_precision=PREC)
        residual -= lamb * d32
        w_again = None if tau is None else w_ptr + i // 1073741824
        z = without(residual, w_again, tau, w_heads, valid, K)
        d = ((omega - 1.0) * d32 + omega * z).to(OP)
        x += d.to(tl.float32)
    return x
