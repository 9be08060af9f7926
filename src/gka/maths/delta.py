"""The gated delta rule, the memory of DeltaNet and Gated DeltaNet, token by token and by chunks.

    S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,      o_t = scale S_t^T q_t

(Yang et al., arXiv 2406.06484 and 2412.06464). It takes one gradient step on |S^T k_t - v_t|^2 per token;
Gated KalmaNet solves the least-squares problem of the whole past. With the write u_t,

    S_t = gamma_t S_{t-1} + k_t u_t^T,      u_t = beta_t (v_t - gamma_t S_{t-1}^T k_t),

the writes of a chunk that starts from S_[c] solve one unit lower triangular system (the WY form):

    (I + diag(beta) tril(K K^T o M, -1)) U = diag(beta) (V - diag(zeta) K S_[c]).

Its inverse does not depend on S_[c], so the serial scan needs only two products per chunk.
M and zeta are the decays of `moments.Decay`, in a form that autograd differentiates accurately.
"""

import torch
from torch import Tensor

from gka.maths.grouped import shared_matmul, weight_shared
from gka.maths.layout import ChunkLayout
from gka.maths.moments import reset_floor


def delta_rule_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the form for decoding. Heads are not shared.

    Args:
        q, k: [B,T,H,K]. v: [B,T,H,V].
        g: log decay [B,T,H], None for no decay. beta: write strength [B,T,H], None for 1.
        state: S_0 [B,H,K,V].
        scale: factor of the readout.

    Returns:
        o [B,T,H,V] and the state after the last token [B,H,K,V].
    """
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].exp()[..., None, None]
        k_t = k[:, t].unsqueeze(-1)
        u_t = v[:, t].unsqueeze(-2) - k_t.transpose(-1, -2) @ state
        if beta is not None:
            u_t = u_t * beta[:, t][..., None, None]
        state = state + k_t * u_t
        outputs.append(scale * (q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def delta_rule_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float,
    layout: ChunkLayout,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, differentiable by autograd, computed in the arguments' common dtype.

    Args:
        q: [B,T,H,K]. k: [B,T,Hk,K]. v: [B,T,Hv,V], Hk and Hv dividing H.
        g: log decay [B,T,H]. beta: write strength [B,T,H].
        state: S_0 [N,H,K,V].
        scale: factor of the readout.
        layout: how the tokens are cut into M chunks.

    Returns:
        o [B,T,H,V] and the states after each sequence's last token [N,H,K,V].
    """
    if layout.num_chunks == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), state
    q, k, v, g, beta = (layout.cut(x).transpose(1, 2) for x in (q, k, v, g, beta))
    mask, zeta = _decays(g, q.dtype)
    to_end, kt = mask[..., -1, :], k.transpose(-1, -2)
    system = (shared_matmul(weight_shared(beta, k), kt) * mask).tril(-1)
    written = torch.cat([weight_shared(beta, v), weight_shared(beta * zeta, k)], -1)
    # u_t = own_t - S_[c]^T seen_t
    own, seen = torch.linalg.solve_triangular(
        system, written, upper=False, unitriangular=True
    ).split([v.shape[-1], k.shape[-1]], -1)
    to_end = weight_shared(to_end, k).transpose(-1, -2)
    u, found, state = _scan_writes(own, seen, to_end, zeta[..., -1], state, layout)
    o = (zeta.unsqueeze(-1) * q) @ found + (shared_matmul(q, kt) * mask) @ u
    return layout.join((scale * o).transpose(1, 2)), state


def _decays(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M [M,H,C,C] and zeta [M,H,C] of `moments.Decay`, in `dtype`, from log decays g [M,H,C].

    Every entry's log decay is a sum over the tokens between, so that dg_i sums the rectangle j < i <= t.
    The derivative of cumulative differences would subtract two nearly equal sums (at g = -100 all of dg
    was rounding).
    """
    g = g.double().clamp_min(reset_floor(dtype))
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    spans = (
        g.unsqueeze(-1).where(future.mT, 0.0).cumsum(-2)
    )  # row t, column j: sum of g over j < i <= t
    mask = spans.to(dtype).masked_fill(future, -torch.inf).exp()
    return mask, g.cumsum(-1).to(dtype).exp()


def _scan_writes(
    own: Tensor, seen: Tensor, to_end: Tensor, whole: Tensor, state: Tensor, layout: ChunkLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """U = own - seen S, S <- whole_c S + to_end U, along each sequence's chunks.

    Args:
        own: [M,H,C,V]. seen: [M,H,C,K]. to_end: [M,H,K,C]. whole: [M,H]. state: [N,H,K,V].

    Returns:
        U of every chunk [M,H,C,V], S at each chunk's start [M,H,K,V], S after the last chunk [N,H,K,V].
    """
    chunks = torch.arange(layout.num_chunks, device=own.device)
    steps = [(who, chunks[rows]) for who, rows in layout.steps(own.device)]
    order = torch.cat([rows for _, rows in steps])
    sizes = [len(rows) for _, rows in steps]
    # One gather and one split, whose derivative is one concatenation. With a slice per step, autograd
    # would form a gradient of the whole sequence's size for every step.
    parts = zip(*(x[order].split(sizes) for x in (own, seen, to_end, whole)), strict=True)
    writes, finds = [], []
    for (who, _), (own_c, seen_c, to_end_c, whole_c) in zip(steps, parts, strict=True):
        found = state[who]
        u = own_c - seen_c @ found
        left = whole_c[..., None, None] * found + to_end_c @ u
        state = left if isinstance(who, slice) else state.index_copy(0, who, left)
        writes.append(u)
        finds.append(found)
    back = torch.argsort(order)
    return torch.cat(writes)[back], torch.cat(finds)[back], state
