"""Functional calls of the (gated) delta rule, in FLA's signatures. The mathematics: gka.maths.delta."""

import torch
from torch import Tensor

from gka.maths.delta import delta_rule_chunks, delta_rule_sequence
from gka.maths.layout import chunk_layout

CHUNK_SIZE = 64


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

    Returns:
        o [B,T,H,V] in the dtype of q, and the final states [N,H,K,V] or None.

    Raises:
        ValueError: shapes, head counts, dtypes or cu_seqlens do not fit; the message names which.
    """
    q, k, v, g, beta, state = _prepare(q, k, v, g, beta, initial_state, cu_seqlens)
    dtype = state.dtype
    g = q.new_zeros(q.shape[:3], dtype=dtype) if g is None else g.to(dtype)
    beta = q.new_ones(q.shape[:3], dtype=dtype) if beta is None else beta.to(dtype)
    o, state = delta_rule_chunks(
        *(x.to(dtype) for x in (q, k, v)), g, beta, state,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        layout=chunk_layout(q.shape[0], q.shape[1], CHUNK_SIZE, cu_seqlens),
    )  # fmt: skip
    return o.to(q.dtype), state if output_final_state else None


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
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` token by token: the same arguments and results, for decoding a few tokens."""
    q, k, v, g, beta, state = _prepare(q, k, v, g, beta, initial_state, cu_seqlens)
    dtype, heads = state.dtype, state.shape[1]
    tokens = [x.to(dtype) for x in (q, _expand_heads(k, heads), _expand_heads(v, heads))]
    gates = [None if x is None else x.to(dtype) for x in (g, beta)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        o, state = delta_rule_sequence(*tokens, *gates, state, scale=scale)
        return o.to(q.dtype), state if output_final_state else None
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = [None if x is None else x[:, begin:end] for x in (*tokens, *gates)]
        o, s = delta_rule_sequence(*part, state[n : n + 1], scale=scale)
        outputs.append(o)
        states.append(s)
    return torch.cat(outputs, 1).to(q.dtype), torch.cat(states) if output_final_state else None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Check the call; queries with all H heads, and the initial states in the dtype to compute in."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must be [B,T,heads,dim] with the B and T of q {tuple(q.shape[:2])}, "
                f"got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"q and k must have the same head dim, got {q.shape[-1]} and {k.shape[-1]}"
        )
    heads = max(x.shape[2] for x in (q, k, v))
    if any(heads % x.shape[2] for x in (q, k, v)):
        raise ValueError(
            "the head counts of q, k and v must divide the largest of them, got "
            f"{q.shape[2]}, {k.shape[2]} and {v.shape[2]}"
        )
    for name, x in (("g", g), ("beta", beta)):
        if x is not None and x.shape != (*q.shape[:2], heads):
            raise ValueError(
                f"{name} must be [B,T,H] = {(*q.shape[:2], heads)}, got shape {tuple(x.shape)}"
            )
    sequences = q.shape[0] if cu_seqlens is None else _count_packed(cu_seqlens, q)
    shape = (sequences, heads, q.shape[-1], v.shape[-1])
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    if initial_state is None:
        state = q.new_zeros(shape, dtype=dtype)
    elif initial_state.shape != shape:
        raise ValueError(
            f"initial_state must be [N,H,K,V] = {shape}, got shape {tuple(initial_state.shape)}"
        )
    else:
        state = initial_state.to(dtype)
    return _expand_heads(q, heads), k, v, g, beta, state


def _count_packed(cu_seqlens: Tensor, q: Tensor) -> int:
    """Check cu_seqlens against packed tokens q [1,T,...]; the number of sequences N."""
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs the sequences packed into B = 1, got B = {q.shape[0]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 1:
        raise ValueError(
            "cu_seqlens must be an integer vector [N+1], got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {q.shape[1]}, got {bounds}")
    return len(bounds) - 1
