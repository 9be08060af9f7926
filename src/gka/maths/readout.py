"""Mix z_t = q_t + alpha_t (x_t - q_t) and readout o_t = scale U_t^T z_t, chunk by chunk."""

from torch import Tensor

from gka.maths.grouped import shared_matmul


def mix(q: Tensor, x: Tensor, alpha: Tensor | None) -> Tensor:
    """z = q + alpha (x - q) with alpha [...] and q, x [..., K]; x where alpha is None (alpha = 1).

    As (1 - alpha) q + alpha x, whose terms do not cancel: x is much smaller than q where keys are large.
    """
    if alpha is None:
        return x
    alpha = alpha.unsqueeze(-1)
    return (1.0 - alpha) * q + alpha * x


def readout(z: Tensor, k: Tensor, v: Tensor, u: Tensor, zeta: Tensor, weights: Tensor) -> Tensor:
    """U_t^T z_t = zeta_t U_[c]^T z_t + sum_j W_tj (z_t . k_j) v_j  [M,H,C,V].

    Args:
        z: [M,H,C,K]. k: [M,Hk,C,K]. v: [M,Hv,C,V].
        u: chunk-start states U_[c] [M,H,K,V].
        zeta, weights: decay from the chunk's start [M,H,C]; W_tj [M,H,C,C].
    """
    scores = shared_matmul(z, k.transpose(-1, -2)) * weights
    return (zeta.unsqueeze(-1) * z) @ u + shared_matmul(scores, v)
