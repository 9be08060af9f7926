"""The reference map behind the ops' conventions: grouped heads, packed sequences, 16-bit inputs."""

import itertools

import torch
from torch import Tensor

from gka.maths.reference import ReferenceSolver, State, reference_sequence


def reference_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: tuple[Tensor | None, Tensor | None] = (None, None),
    cu_seqlens: Tensor | None = None,
    *,
    scale: float = 1.0,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    solver: ReferenceSolver = "chebyshev",
) -> tuple[Tensor, State]:
    """`gka.maths.reference` on the inputs of `chunk_gka`, checked there; float32 or better inside.

    With `solver="exact"` and float64 inputs it is the oracle of all other forms.

    Returns:
        o [B,T,H,V] in q's dtype and the final state (h_kk, h_kv).
    """
    heads, sequences = q.shape[2], len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    h0, u0 = (
        q.new_zeros(sequences, heads, q.shape[-1], width, dtype=dtype) if given is None else given
        for given, width in zip(initial_state, (q.shape[-1], v.shape[-1]), strict=True)
    )
    q_, k_, v_ = (x.repeat_interleave(heads // x.shape[2], 2).to(dtype) for x in (q, k, v))

    def part(span: slice, n: slice) -> tuple[Tensor, State]:
        gates = (None if x is None else x[:, span].to(dtype) for x in (g, gk, alpha, beta))
        g_, gk_, alpha_, beta_ = gates
        return reference_sequence(
            q_[:, span], k_[:, span], v_[:, span], g_, gk_, alpha_, beta_, (h0[n], u0[n]),
            scale=scale, ridge_ratio=ridge_ratio, num_iter=num_iter, solver=solver,
        )  # fmt: skip

    if cu_seqlens is None:
        o, state = part(slice(None), slice(None))
        return o.to(q.dtype), state
    bounds = enumerate(itertools.pairwise(cu_seqlens.tolist()))
    parts = [part(slice(a, b), slice(n, n + 1)) for n, (a, b) in bounds]
    h, u = (torch.cat([state[i] for _, state in parts]) for i in (0, 1))
    return torch.cat([o for o, _ in parts], 1).to(q.dtype), (h, u)
