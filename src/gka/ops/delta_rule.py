"""Functional calls of the (gated) delta rule, in FLA's signatures. The mathematics: gka.maths.delta."""

import torch
from torch import Tensor

from gka.ops import checks
from gka.ops.delta_operator import run


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t, by chunks.

    Without `g` it is DeltaNet (arXiv 2406.06484), with it Gated DeltaNet (arXiv 2412.06464). Keys
    are expected to have 2-norm at most 1 and beta to lie in [0, 1]: the map may grow without
    bound otherwise. Computes in float32 (float64 for float64 inputs).

    Args:
        q: queries [B,T,Hq,K]. k: keys [B,T,Hk,K]. v: values [B,T,Hv,V]. H, the number of states, is
            the largest of the three head counts; the others divide it, consecutive heads share.
        g: log decay [B,T,H], <= 0; None for no decay.
        beta: write strength [B,T,H]; None for 1.
        scale: factor of the readout; None for K^-1/2.
        initial_state: S_0 [N,H,K,V]; None for zeros.
        output_final_state: whether to return the states after each sequence's last token.
        cu_seqlens: bounds [N+1] of sequences packed into B = 1; None for N = B sequences of T.
        cu_seqlens_cpu: its copy on the CPU; with it the call does not wait for the device to read it.

    Returns:
        o [B,T,H,V] in the dtype of q, and the final states [N,H,K,V] or None.

    Raises:
        ValueError, TypeError: a shape, range or dtype is wrong; the message names the argument.
    """
    checks.check_scale(scale)
    checks.check_flags(output_final_state=output_final_state)
    q, state = _prepare(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu)
    g = q.new_zeros(q.shape[:3]) if g is None else g
    beta = q.new_ones(q.shape[:3]) if beta is None else beta
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    o, state = run(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, stepwise=False)
    return o, state if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` token by token: the same arguments and results, for decoding a few tokens."""
    checks.check_scale(scale)
    checks.check_flags(output_final_state=output_final_state)
    q, state = _prepare(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu)
    k, v = _expand_heads(k, q.shape[2]), _expand_heads(v, q.shape[2])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    o, state = run(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, stepwise=True)
    return o, state if output_final_state else None


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B,T,h,D] -> [B,T,H,D], consecutive heads share."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check the call. Queries with all H heads, and the initial states in the dtype to compute in."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, x)
    if all(x.dim() == 4 for x in (q, k, v)) and q.shape[2] > 0:
        most = max(x.shape[2] for x in (q, k, v))
        q = _expand_heads(q, most) if most % q.shape[2] == 0 else q
    checks.check_heads(q, k, v)
    checks.check_gates(q, g=g, beta=beta)
    sequences = checks.check_cu_seqlens(q, cu_seqlens)
    checks.check_cu_seqlens_cpu(cu_seqlens, cu_seqlens_cpu)
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        return q, q.new_zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    checks.check_state("initial_state", initial_state, shape, q)
    return q, initial_state
