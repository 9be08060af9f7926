"""States of texts that were read apart, combined: the moments are decayed sums (paper: section 4).

Unrolled from zero over the tokens of B, S_t = gamma_t S_{t-1} + k_t v_t^T gives S(B) = sum_j M_jT k_j v_j^T.
From another start S(A) the same tokens add S(B) to what is left of it:
    S(A B) = exp(g_1 + ... + g_T) S(A) + S(B).
"""

from torch import Tensor


def after(earlier: Tensor, later: Tensor, log_decay: Tensor | None) -> Tensor:
    """The moment [N,H,K,V] of both texts, `log_decay` [N,H] being the later one's total; None: none."""
    if log_decay is None:
        return earlier + later
    return log_decay.double().exp().to(earlier.dtype)[..., None, None] * earlier + later
