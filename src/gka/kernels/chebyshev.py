"""The Chebyshev loop on the tensor cores."""

import triton
import triton.language as tl

from gka.kernels.common import add_product


@triton.jit
def chebyshev(
    rhs, kn, hn, h_ptr, h_coef, weight, lamb, rho2, num_iter, K: tl.constexpr, TILED: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x of B_t x_t = rhs_t, B_t = 2/(L + mu) (H_t + lambda_t I), in the residual form.

    rhs [C, BK] float32 of size about one; kn [C, BK], hn [BK, BK] in OP (TILED: at h_ptr); h_coef [C] and
    weight [C, C] carry 2/(L + mu); lamb = 2a/(1 + 2a). The update d is rounded to OP before it
    enters both x and the residual, so rounding it costs no accuracy.
    """
    residual = rhs
    d = rhs.to(OP)
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
        d = ((omega - 1.0) * d32 + omega * residual).to(OP)
        x += d.to(tl.float32)
    return x
