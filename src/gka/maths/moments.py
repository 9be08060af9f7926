"""The moments H_t = gamma_t H_{t-1} + k_t k_t^T and U_t = gamma_t U_{t-1} + k_t v_t^T, chunk by chunk.

Only the states at chunk starts, H_[c] and U_[c], are formed; inside a chunk (section 4.2.1)
    H_t = zeta_t H_[c] + sum_{j<=t} W_tj k_j k_j^T,   W_tj = M_jt beta_j^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gka.maths.grouped import shared_matmul, weight_shared
from gka.maths.layout import ChunkLayout


def reset_floor(dtype: torch.dtype) -> float:
    """The floor that replaces all lower log decays: a power of two whose exp is 0 in `dtype`.

    A decay of 0 is a hard reset. Without a floor, sums with -inf would give inf - inf between later
    tokens, and sums with -1e18 would lose what is added; 64 of these floors sum to 8192 (float32).
    """
    return -1024.0 if dtype == torch.float64 else -128.0


@dataclass(frozen=True)
class Decay:
    """Decays inside chunks, from differences of the cumulative log decay, never from quotients.

    Sums and differences are float64, so that the difference of two large sums is accurate. Only the
    exponential is rounded to the working precision.

    Attributes:
        cumulative: log decay from the chunk's start to t, g_t included, float64 [M,H,C].
        dtype: working precision of the decays.
    """

    cumulative: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, g: Tensor | None, like: Tensor) -> "Decay":
        """From log decays g [M,H,C]; None: no decay. `like` [M,H,C,...] gives shape and dtype."""
        if g is None:
            g = like.new_zeros(like.shape[:3])
        return cls(g.double().clamp_min(reset_floor(like.dtype)).cumsum(-1), like.dtype)

    def __getitem__(self, rows: slice) -> "Decay":
        return Decay(self.cumulative[rows], self.dtype)

    @property
    def mask(self) -> Tensor:
        """M_jt as rows t and columns j [M,H,C,C], exact zeros where j > t."""
        b = self.cumulative
        future = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).triu(1)
        log_mask = (b.unsqueeze(-1) - b.unsqueeze(-2)).to(self.dtype)
        return log_mask.masked_fill_(future, -torch.inf).exp_()

    @property
    def zeta(self) -> Tensor:
        """Decay from the chunk's start to t [M,H,C]."""
        return self.cumulative.to(self.dtype).exp()

    @property
    def to_end(self) -> Tensor:
        """Decay from j to the chunk's end [M,H,C]."""
        b = self.cumulative
        return (b[..., -1:] - b).to(self.dtype).exp()

    @property
    def whole(self) -> Tensor:
        """Decay over the whole chunk [M,H]."""
        return self.cumulative[..., -1].to(self.dtype).exp()


def chunk_moments(weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_j w_j k_j v_j^T over each chunk: [M,H,C], [M,Hk,C,K], [M,Hv,C,V] -> [M,H,K,V]."""
    return shared_matmul(weight_shared(weights, k).transpose(-1, -2), v)


def scan(
    local: Tensor, whole: Tensor, boundary: Tensor, layout: ChunkLayout, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S <- whole_c S + local_c along each sequence's chunks, backwards if `reverse`.

    Args:
        local: [M,H,K,V], overwritten by the result.
        whole: decay over each chunk [M,H].
        boundary: S before the first (reverse: the last) chunk, [N,H,K,V].

    Returns:
        S before each chunk [M,H,K,V] (reverse: after it), and S after the last (reverse: before the
        first) chunk [N,H,K,V].
    """
    state = boundary.clone()
    for sequences, rows in layout.steps(local.device, reverse):
        found = state[sequences]
        left = found * whole[rows][..., None, None] + local[rows]
        local[rows] = found
        state[sequences] = left
    return local, state


def after(earlier: Tensor, later: Tensor, log_decay: Tensor | None) -> Tensor:
    """The moment [N,H,K,V] of two texts in sequence, from their separate moments (paper: section 4).

    Unrolled from zero over the tokens of B, S_t = gamma_t S_{t-1} + k_t v_t^T gives
    S(B) = sum_j M_jT k_j v_j^T. Started from S(A) instead, the same tokens add S(B) to the decayed S(A):
    S(A B) = exp(g_1 + ... + g_T) S(A) + S(B).

    Args:
        log_decay: total log decay over the later text [N,H]; None: no decay.
    """
    if log_decay is None:
        return earlier + later
    return log_decay.double().exp().to(earlier.dtype)[..., None, None] * earlier + later
