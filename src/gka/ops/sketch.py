"""Gated KalmaNet whose solve is in d of K dimensions: the public ops on projected queries and keys.

o = scale U'^T x' where alpha is None: one call of `chunk_gka` on S^T q, S^T k and v. With the mix gate,
o = scale (alpha U'^T x' + (1 - alpha) U^T q): its second term is `chunk_simple_gla` on q, k and v.
"""

from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.maths.sketch import orthonormal, project
from gka.ops import checks
from gka.ops.chunk import run_call
from gka.ops.context import SequenceContext
from gka.ops.decode import fused_recurrent_gka_, resolve_step
from gka.ops.dispatch import autocast

__all__ = [
    "chunk_sketched_gka",
    "fused_recurrent_sketched_gka",
    "fused_recurrent_sketched_gka_",
    "orthonormal",
]

Sketched = tuple[Tensor, ...]
"""(h_kk [N,H,d,d], h_kv [N,H,d,V]) of projected keys; with alpha h_kv [N,H,K,V] of whole keys, too."""


def chunk_sketched_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sketch: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    initial_state: Sketched | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    solver: str = "chebyshev",
    cu_seqlens_cpu: Tensor | None = None,
    context: SequenceContext | None = None,
    keep_states: bool = False,
) -> tuple[Tensor, Sketched | None]:
    """`chunk_gka` with the solve in d dimensions (arXiv 2511.21016, appendix H; docs/maths.md, section 12).

    z_t = q_t + alpha_t (S x'_t - q_t),  (H'_t + lambda'_t I) x'_t = S^T q_t,  o_t = scale U_t^T z_t,
    H'_t = S^T H_t S,  lambda'_t = ridge_ratio |H'_t|_F.

    Differentiable as `chunk_gka`, in the sketch too. With keys in the span of S and S^T S = I the result is
    `chunk_gka`'s.

    Args:
        q, k, v, g, gk, alpha, ridge_ratio, num_iter, output_final_state, cu_seqlens, beta, backend,
            chunk_size, solver, cu_seqlens_cpu, context, keep_states: as in `chunk_gka`. A named backend must
            be able to run heads (d, V), and (K, V) without a solve if alpha is given; "hopper" takes d = 64
            and 128. keep_states concerns the solve.
        sketch: S [Hk,K,d] of each key head, with orthonormal columns (`gka.ops.orthonormal`), cast to q's
            dtype. Others give the formula as it stands, where the ridge no longer follows |H|.
        scale: None: K^-1/2, with the K of q.
        initial_state: (h_kk [N,H,d,d], h_kv [N,H,d,V]) of projected keys, and with alpha a third state, h_kv
            [N,H,K,V] of whole keys; otherwise as in `chunk_gka`.

    Returns:
        o [B,T,H,V] in q's dtype, and the states in the form of initial_state, or None.

    Raises:
        ValueError, TypeError: a shape, range or dtype is wrong; the message names the argument.
        RuntimeError: the named backend cannot run these inputs.
    """
    return _run(
        "chunk", (q, k, v), sketch, (g, gk, alpha, beta), scale, initial_state, keep_states,
        ridge_ratio=ridge_ratio, num_iter=num_iter, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, backend=backend, chunk_size=chunk_size, solver=solver,
        cu_seqlens_cpu=cu_seqlens_cpu, context=context,
    )  # fmt: skip


def fused_recurrent_sketched_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sketch: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    initial_state: Sketched | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    backend: str = "auto",
    solver: str = "chebyshev",
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Sketched | None]:
    """`chunk_sketched_gka` token by token; arguments, results and errors are those."""
    return _run(
        "recurrent", (q, k, v), sketch, (g, gk, alpha, beta), scale, initial_state, False,
        ridge_ratio=ridge_ratio, num_iter=num_iter, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, backend=backend, chunk_size=64, solver=solver,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


def fused_recurrent_sketched_gka_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sketch: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    *,
    state: Sketched,
    state_indices: Tensor | None = None,
    commit: bool = True,
    beta: Tensor | None = None,
    backend: str = "auto",
    solver: str = "chebyshev",
) -> Tensor:
    """Decoding with states updated in place: `fused_recurrent_gka_` of projected tokens, and with alpha a
    second launch for the whole keys.

    Args:
        state: h_kk [P,H,d,d], h_kv [P,H,d,V] and, if alpha is given, h_kv [P,H,K,V] of whole keys.
        q, k, v, sketch, g, gk, alpha, scale, ridge_ratio, num_iter: as in `chunk_sketched_gka`.
        state_indices, commit, beta, backend, solver: as in `fused_recurrent_gka_`.

    Returns:
        o [B,T,H,V] in q's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_recurrent_gka_`; the states are unchanged then.
    """
    (q, k, v), basis = _checked(q, k, v, sketch)
    held = _states(state, alpha, "state")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {
        "state_indices": state_indices, "commit": commit, "beta": beta, "backend": backend,
    }  # fmt: skip
    if alpha is not None:  # what the first call does not check, before it writes
        checks.check_gates(q, alpha=alpha)
        checks.check_pool((None, held[2]), state_indices, q, v, False)
        resolve_step(backend, q, v, "chebyshev")
    solved = fused_recurrent_gka_(
        project(q, basis), project(k, basis), v, g, gk, None, scale, ridge_ratio, num_iter,
        state=(held[0], held[1]), solver=solver, **options,
    )  # fmt: skip
    if alpha is None:
        return solved
    plain = fused_recurrent_gka_(
        q, k, v, g, scale=scale, num_iter=0, state=(None, held[2]), **options
    )
    return _mixed(solved, plain, alpha)


def _run(
    mode: Any,
    heads: tuple[Tensor, Tensor, Tensor],
    sketch: Tensor,
    gates: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Sketched | None,
    keep_states: bool,
    *,
    ridge_ratio: float,
    num_iter: int,
    solver: str,
    **options: Any,
) -> tuple[Tensor, Sketched | None]:
    (q, k, v), basis = _checked(*heads, sketch)
    g, gk, alpha, beta = gates
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    before = None if initial_state is None else _states(initial_state, alpha, "initial_state")
    solved, found = run_call(
        mode, project(q, basis), project(k, basis), v, g, gk, None, beta, scale=scale,
        ridge_ratio=ridge_ratio, num_iter=num_iter, solver=solver, keep_states=keep_states,
        initial_state=None if before is None else (before[0], before[1]), **options,
    )  # fmt: skip
    if alpha is None:
        return solved, found
    checks.check_gates(q, alpha=alpha)
    plain, whole = run_call(
        mode, q, k, v, g, None, None, beta, scale=scale, ridge_ratio=1.0, num_iter=0, with_h=False,
        initial_state=None if before is None else before[2], **options,
    )  # fmt: skip
    o = _mixed(solved, plain, alpha)
    return o, None if found is None or whole is None else (*found, whole[1])


def _mixed(solved: Tensor, plain: Tensor, alpha: Tensor) -> Tensor:
    """alpha solved + (1 - alpha) plain, computed in float32 or better, in the dtype of `plain`."""
    work = torch.promote_types(plain.dtype, torch.float32)
    share = alpha.unsqueeze(-1).to(work)
    return torch.lerp(plain.to(work), solved.to(work), share).to(plain.dtype)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, sketch: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k and v under autocast, and the sketch in their dtype, all checked."""
    checks.check_tensors(q=q, k=k, v=v, sketch=sketch)
    q, k, v = autocast(q, k, v)
    checks.check_heads(q, k, v)
    expected, dim = (k.shape[2], k.shape[3]), k.shape[3]
    if sketch.dim() != 3 or sketch.shape[:2] != expected or not 1 <= sketch.shape[2] <= dim:
        raise InputError(
            f"sketch must be [Hk, K, d] = {list(expected)} and d from 1 to {dim}: a map for each key head; "
            f"got {list(sketch.shape)}."
        )
    if sketch.dtype not in checks.DTYPES or sketch.device != q.device:
        raise InputError(
            f"sketch must be a float tensor on {q.device}; got {sketch.dtype}, {sketch.device}."
        )
    return (q, k, v), sketch.to(q.dtype)


def _states(given: object, alpha: Tensor | None, name: str) -> Sketched:
    """The states, as many as the call has; `run_call` checks each."""
    wanted = 2 if alpha is None else 3
    if not isinstance(given, tuple | list) or len(given) != wanted:
        whole = "" if alpha is None else ", and h_kv [N, H, K, V] of whole keys for alpha's share"
        count = len(given) if isinstance(given, tuple | list) else type(given).__name__
        raise InputError(
            f"{name} must hold {wanted} states: h_kk [N, H, d, d], h_kv [N, H, d, V]{whole}; got {count}."
        )
    return tuple(given)
