"""For inspection: the reference map with the ops' conventions, and the steps of a solve."""

import itertools

import torch
from torch import Tensor

from gka.maths.chunked import Settings, Tokens
from gka.maths.reference import ReferenceSolver, State, reference_sequence
from gka.maths.solvers import SOLVERS, SolverName
from gka.ops import checks
from gka.ops.backends import Call, get_backend, resolve_backend
from gka.ops.dispatch import no_autocast


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
    """`gka.maths.reference` on the checked inputs of `chunk_gka`, computed in float32 or better.

    Inputs are not checked.
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


@torch.no_grad()
def solver_steps(
    k: Tensor,
    gk: Tensor | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    solver: str = "adaptive",
    q: Tensor | None = None,
    beta: Tensor | None = None,
    num_heads: int | None = None,
    chunk_size: int = 64,
    value_dim: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Steps that `chunk_gka(..., solver=solver)` takes in each token's chunk on that backend.

    With "adaptive" they are at most num_iter and depend on H alone: on keys, write gates and the decay of H.
    With "cg" they are those of the chunk's slowest token and depend on the queries too.

    Args:
        k, gk, ridge_ratio, num_iter, cu_seqlens, beta, chunk_size: as in `chunk_gka`.
        initial_state: h_kk [N,H,K,K] alone.
        solver: "adaptive" or "cg".
        q: queries [B,T,H,K], for "cg" alone.
        num_heads: query heads H. None: as many as q has, or k without q.
        value_dim: V, on which the choice of a backend depends. None: K.
        backend: the backend whose steps are counted, as in `chunk_gka`. Backends differ in rounding and in
            the vector of the certificate, and so may differ in steps. "reference" counts none.

    Returns:
        int64 [B,T,H]; the same for all tokens of a chunk.

    Raises:
        ValueError, TypeError, RuntimeError: as `chunk_gka`.
    """
    checks.check_tensor("k", k)
    if k.dim() != 4:
        raise ValueError(f"k must have 4 dimensions [B, T, heads, dim]; got {list(k.shape)}.")
    counted = _check_counted(solver, q)
    heads = _query_heads(k, q, num_heads)
    if q is None:
        q = k.new_zeros(1, 1, 1, 1).expand(*k.shape[:2], heads, k.shape[3])
    dims = (k.shape[3], k.shape[3] if value_dim is None else value_dim)
    v = k.new_zeros(1, 1, 1, 1).expand(*k.shape[:3], dims[1])
    checks.check_inputs(q, k, v, gk=gk, beta=beta)
    checks.check_numbers(ridge_ratio, num_iter, chunk_size)
    sequences = checks.check_cu_seqlens(q, cu_seqlens)
    if cu_seqlens is not None:
        checks.check_bounds(cu_seqlens, k.shape[1])
    if initial_state is not None:
        shape = (sequences, heads, k.shape[3], k.shape[3])
        checks.check_state("initial_state (h_kk)", initial_state, shape, q)
    name = resolve_backend(backend, Call(k.device, k.dtype, counted, dims, chunk_size))
    tokens = Tokens(q, k, v, None, gk, None, beta, initial_state, None, cu_seqlens)
    settings = Settings(1.0, ridge_ratio, num_iter, chunk_size, False, True, counted)
    if num_iter == 0:
        return torch.zeros(q.shape[:3], dtype=torch.int64, device=k.device)
    with no_autocast(k.device.type):
        return get_backend(name).steps(tokens, settings)


def _check_counted(solver: str, q: Tensor | None) -> SolverName:
    """Check that the solver's steps differ by chunk, and that queries are given if they matter."""
    known = checks.check_solver(solver)
    if not SOLVERS[known].adaptive:
        raise ValueError(f"solver must be adaptive or cg: {known} takes num_iter steps everywhere.")
    if known == "cg" and q is None:
        raise ValueError('q must be given with solver="cg", whose steps depend on the queries.')
    if known != "cg" and q is not None:
        raise ValueError(f"q must be None with solver={known!r}, whose steps do not depend on it.")
    return known


def _query_heads(k: Tensor, q: Tensor | None, num_heads: int | None) -> int:
    if q is not None:
        checks.check_tensor("q", q)
    shared = k if q is None or q.dim() != 4 else q
    heads = shared.shape[2] if num_heads is None else num_heads
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"num_heads must be a positive int; got {heads!r}.")
    if k.shape[2] > 0 and heads % k.shape[2] != 0:
        raise ValueError(f"num_heads must be a multiple of k's {k.shape[2]} heads; got {heads}.")
    if q is not None and shared.shape[2] != heads:
        raise ValueError(f"num_heads must be q's {shared.shape[2]} heads; got {heads}.")
    return heads
