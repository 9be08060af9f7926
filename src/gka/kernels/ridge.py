"""F_t of every token of a chunk, and the chunk's system scaled for the solve."""

import triton
import triton.language as tl

from gka.kernels.common import add_product


@triton.jit
def chunk_system(
    kn, hn, h_ptr, h_scale, h_norm2, zeta, weight, K: tl.constexpr, TILED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """F_t^2 and what the derivative reuses, for keys kn and weights that carry the keys' scale.

    Returns s_j = k_j^T H_[c] k_j, (W (K K^T)^2)_tj, F_t^2.
    """
    kh = tl.zeros(kn.shape, tl.float32)
    kh = add_product(kh, kn, hn, h_ptr, K, TILED, False, PREC) * h_scale
    energies = tl.sum(kh * kn.to(tl.float32), 1)
    gram = tl.dot(kn, tl.trans(kn), input_precision=PREC)
    pair = tl.dot(weight, gram * gram, input_precision=PREC)
    fro2 = zeta * zeta * h_norm2 + tl.sum(
        weight * (2.0 * zeta[:, None] * energies[None, :] + pair), 1
    )
    return energies, pair, fro2
