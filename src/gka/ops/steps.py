"""What the adaptive solver will do: steps by token, for those who look inside."""

import torch
from torch import Tensor

from gka.maths.chunked import Settings, Tokens, token_steps
from gka.ops import checks
from gka.ops.operator import no_autocast


@torch.no_grad()
def solver_steps(
    k: Tensor,
    gk: Tensor | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    num_heads: int | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Steps n <= num_iter that `chunk_gka(..., solver="adaptive")` takes at each token.

    They depend on H alone: on keys, write gates and the decay of H, not on queries or values.

    Args:
        k, gk, ridge_ratio, num_iter, cu_seqlens, beta, chunk_size: as in `chunk_gka`.
        initial_state: h_kk [N,H,K,K] alone.
        num_heads: query heads H. None: as many as k has.

    Returns:
        int64 [B,T,H]; the same for all tokens of a chunk.

    Raises:
        ValueError, TypeError: as `chunk_gka`.
    """
    checks.check_tensor("k", k)
    if k.dim() != 4:
        raise ValueError(f"k must have 4 dimensions [B, T, heads, dim]; got {list(k.shape)}.")
    heads = k.shape[2] if num_heads is None else num_heads
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"num_heads must be a positive int; got {heads!r}.")
    if k.shape[2] > 0 and heads % k.shape[2] != 0:
        raise ValueError(f"num_heads must be a multiple of k's {k.shape[2]} heads; got {heads}.")
    q = k.new_zeros(1, 1, 1, 1).expand(*k.shape[:2], heads, k.shape[3])
    checks.check_heads(q, k, k)
    checks.check_gates(q, gk=gk, beta=beta)
    checks.check_numbers(ridge_ratio, num_iter, chunk_size)
    sequences = checks.check_cu_seqlens(q, cu_seqlens)
    if cu_seqlens is not None:
        checks.check_bounds(cu_seqlens, k.shape[1])
    if initial_state is not None:
        shape = (sequences, heads, k.shape[3], k.shape[3])
        checks.check_state("initial_state (h_kk)", initial_state, shape, q)
    tokens = Tokens(q, k, k, None, gk, None, beta, initial_state, None, cu_seqlens)
    settings = Settings(1.0, ridge_ratio, num_iter, chunk_size, False, True, "adaptive")
    with no_autocast(k.device.type):
        return token_steps(tokens, settings)
