"""chunk_gka and fused_recurrent_gka: Gated KalmaNet as functions, with FLA's call signatures."""

import os
from dataclasses import replace

import torch
from torch import Tensor

from gka.errors import InputError
from gka.maths.chunked import Settings, Tokens
from gka.ops import checks
from gka.ops.autograd import GKAEager, GKAFunction, pack
from gka.ops.backends import Call, Mode, get_backend, note_backend, resolve_backend
from gka.ops.context import SequenceContext, check_context
from gka.ops.dispatch import autocast, check_derivable, keep, kind_of, known, no_autocast
from gka.ops.external import EXTERNAL, Given, resolve_external
from gka.ops.external_call import run_external
from gka.ops.initial_states import check_initial_state, first_of_packed, states_before, states_of
from gka.ops.reference import reference_gka

State = tuple[Tensor, Tensor]


def chunk_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    initial_state: State | None = None,
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
) -> tuple[Tensor, State | None]:
    """Gated KalmaNet over whole sequences, chunk by chunk (arXiv 2511.21016, section 4).

    o_t = scale U_t^T z_t,  z_t = q_t + alpha_t (x_t - q_t),  (H_t + lambda_t I) x_t = q_t,
    H_t = exp(gk_t) H_{t-1} + k_t k_t^T,  U_t = exp(g_t) U_{t-1} + k_t v_t^T,
    lambda_t = ridge_ratio |H_t|_F; x_t = 0 while the history is empty.

    Differentiable in q, k, v, g, gk, alpha, beta and both initial states, from o and both final
    states. The gradient is that of the exact solve, evaluated at the computed solutions (docs/maths.md,
    section 8), with at most twice their truncation error. It is not the truncated iteration's derivative.

    Args:
        q: queries [B,T,H,K], float64, float32, bfloat16 or float16; K in 1..256.
        k: keys [B,T,Hk,K]; H a multiple of Hk: consecutive query heads share a key head. Any norm with
            backend="torch". The other backends square |H_t| unscaled: float32 and bfloat16 keys of norm
            above 4e9 give NaN there (GKA_DEBUG=1 refuses them).
        v: values [B,T,Hv,V]; H a multiple of Hv; V in 1..256.
        g: log decay of U [B,T,H], <= 0. None: no decay.
        gk: log decay of H [B,T,H]. Pass g itself to tie the two, as the paper's layer does.
            None: H does not decay.
        alpha: mix gate [B,T,H]. None: 1, the ridge solution itself.
        scale: factor of the readout. None: K^-1/2.
        ridge_ratio: a in lambda_t = a |H_t|_F, 1e-9..1e9.
        num_iter: Chebyshev steps r, 0..10000; with another solver, those whose error bound it keeps.
            0: no ridge, that is gated linear attention.
        initial_state: (h_kk [N,H,K,K], h_kv [N,H,K,V]) before the first token, float32 (float64 for
            float64 inputs); h_kk symmetric. N is B, or the number of packed sequences; with N = 1 the states
            are those of the first packed sequence, and the others start from zero.
        output_final_state: return the states after the last token too.
        cu_seqlens: bounds of packed sequences, int64 [N+1] from 0 to T, with B = 1.
        beta: write gate [B,T,H]: scales k and v of each head without copying them.
        backend: "auto", "hopper" (H100, H200), "triton" (NVIDIA GPUs), "torch" (any device) or
            "reference" (token by token, slow); `gka.ops.available_backends` lists what can run.
        chunk_size: tokens per chunk, 1..4096. It affects speed and memory, not the result (with
            solver="adaptive" the result only within the error bound of num_iter steps).
        solver: "chebyshev" takes num_iter steps; "adaptive" takes, per chunk and head, the fewest
            whose proven error bound is that of num_iter steps; "cg" takes conjugate-gradient steps
            until each token's residual proves that bound. docs/numerics.md has the proofs.
        cu_seqlens_cpu: a copy of cu_seqlens on the CPU, with which the call need not wait for the device
            to read the lengths. It must hold the same values (GKA_DEBUG=1 checks that).
        context: a `gka.parallel.ContextParallel`: the tokens are this rank's part of a sequence that is split
            over ranks, all of which make the call. It holds cu_seqlens. initial_state is that of the whole
            sequences, the same on every rank, and only the ranks where they begin have its gradient.
            Final states are those after this rank's part of each of its sequences.
        keep_states: keep the states at chunk starts for the backward pass, which then does not compute them
            again: 2 H K (K + V) bytes a chunk (4 for float32 inputs), 134 MB for 8 x 2048 tokens and 8 heads
            of 128. Only if a gradient is wanted, and only with the backends "hopper" and "triton"; not under
            torch.vmap. Gradients are the same, bit for bit, where the backward pass takes all heads at once
            anyway (up to 4224 chunks times heads), and otherwise up to rounding.

    Returns:
        o [B,T,H,V] in q's dtype, and (h_kk, h_kv) or None.

    Raises:
        ValueError, TypeError: a shape, range or dtype is wrong; the message names the argument.
        RuntimeError: the named backend cannot run these inputs.
    """
    return run_call(
        "chunk", q, k, v, g, gk, alpha, beta, scale=scale, ridge_ratio=ridge_ratio,
        num_iter=num_iter, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu, backend=backend, chunk_size=chunk_size,
        solver=solver, context=context, keep_states=keep_states,
    )  # fmt: skip


def fused_recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    backend: str = "auto",
    solver: str = "chebyshev",
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """Gated KalmaNet token by token, for decoding: the same map as `chunk_gka`.

    Arguments, results and errors are those of `chunk_gka`, and so is the gradient, which is computed
    chunk by chunk. Each token costs the same, with no chunk to fill. With solver="adaptive" each token
    is a chunk of its own, so its number of steps may differ from that of `chunk_gka`.
    """
    return run_call(
        "recurrent", q, k, v, g, gk, alpha, beta, scale=scale, ridge_ratio=ridge_ratio,
        num_iter=num_iter, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu, backend=backend, chunk_size=64,
        solver=solver,
    )  # fmt: skip


def run_call(
    mode: Mode,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    scale: float | None,
    ridge_ratio: float,
    num_iter: int,
    initial_state: State | Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
    chunk_size: int,
    solver: str = "chebyshev",
    with_h: bool = True,
    cu_seqlens_cpu: Tensor | None = None,
    context: SequenceContext | None = None,
    keep_states: bool = False,
) -> tuple[Tensor, State | None]:
    if context is not None:
        checks.check_tensor("q", q)
        check_context(context, q.shape[1] if q.dim() > 1 else 0, cu_seqlens)
        cu_seqlens, cu_seqlens_cpu = context.cu_seqlens, context.cu_seqlens_cpu
        wanted, gates = with_h and (num_iter > 0 or output_final_state), (g, gk, alpha, beta)
        initial_state = states_before(context, q, k, v, gates, initial_state, wanted, with_h)
    numbers = (
        scale, ridge_ratio, num_iter, chunk_size, output_final_state, solver, with_h, backend,
        keep_states,
    )  # fmt: skip
    kind = kind_of(
        q, k, v, g, gk, alpha, beta, initial_state, cu_seqlens, cu_seqlens_cpu, mode, *numbers
    )
    found = known(kind)
    if found is None:
        given = (q, k, v, g, gk, alpha, beta, initial_state, cu_seqlens, cu_seqlens_cpu)
        found = check_call(*given, *numbers)
        keep(kind, *found)
    backend, settings = found
    if settings.keep_states and not _derived(q, k, v, g, gk, alpha, beta, initial_state):
        settings = replace(settings, keep_states=False)
    q, k, v = autocast(q, k, v)
    if cu_seqlens_cpu is cu_seqlens:  # torch.compile refuses one tensor as two arguments
        cu_seqlens_cpu = None
    h0 = u0 = None
    if initial_state is not None:
        h0, u0 = states_of(initial_state, None if cu_seqlens is None else len(cu_seqlens) - 1)
    gk = None if settings.tied else gk
    tokens = Tokens(q, k, v, g, gk, alpha, beta, h0, u0, cu_seqlens, cu_seqlens_cpu)
    if backend == "reference":
        o, state = _reference(tokens, settings, g)
        return o, state if output_final_state else None
    if kind is not None:
        o, h, u = GKAEager.apply(settings, mode, backend, *tokens)
    else:
        check_derivable("Gated KalmaNet")
        o, _, _, h, u, _ = GKAFunction.apply(*pack(tokens, settings), mode, backend)
    return o, (h, u) if output_final_state else None


def check_call(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gk: Tensor | None, alpha: Tensor | None,
    beta: Tensor | None, initial_state: State | Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None, scale: float | None, ridge_ratio: float, num_iter: int,
    chunk_size: int, output_final_state: bool, solver: str, with_h: bool, backend: str,
    keep_states: bool = False,
) -> tuple[str, Settings]:  # fmt: skip
    """Check all arguments, and choose the backend."""
    checks.check_tensors(q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    gates = {"g": g, "gk": gk, "alpha": alpha, "beta": beta}
    checks.check_inputs(q, k, v, **gates)
    checks.check_settings(ridge_ratio, num_iter, chunk_size, scale, output_final_state)
    sequences = checks.check_lengths(q, cu_seqlens, cu_seqlens_cpu)
    if initial_state is not None:
        rows = first_of_packed(initial_state, cu_seqlens, sequences)
        check_initial_state(initial_state, rows, q, v, with_h)
    debug = os.environ.get("GKA_DEBUG") == "1"
    if debug:
        h0, u0 = states_of(initial_state)
        checks.check_values(q=q, k=k, v=v, g=g, gk=gk, alpha=alpha, beta=beta, h_kk=h0, h_kv=u0)
        checks.check_same_bounds(cu_seqlens, cu_seqlens_cpu)
    dims = (q.shape[-1], v.shape[-1])
    call = Call(q.device, q.dtype, checks.check_solver(solver), dims, chunk_size)
    backend = resolve_backend(backend, call)
    if num_iter > 0 and debug:
        checks.check_key_norms(k, backend)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    tied, with_h = gk is not None and gk is g, with_h and output_final_state
    check_keeping(keep_states, backend)
    settings = Settings(
        scale, float(ridge_ratio), num_iter, chunk_size, tied, with_h, call.solver, keep_states
    )
    return backend, settings


def check_keeping(keep_states: bool, backend: str) -> None:
    """Raises InputError if states are to be kept by a backend that keeps none, TypeError if not a bool."""
    checks.check_flags(keep_states=keep_states)
    if keep_states and (backend == "reference" or get_backend(backend).kept_shape is None):
        raise InputError(
            f'keep_states=True needs the backend "hopper" or "triton"; this call runs on {backend!r}. '
            "Leave keep_states out there."
        )


def _derived(*inputs: Tensor | State | None) -> bool:
    """Whether a gradient of any input may be asked for."""
    if not torch.is_grad_enabled():
        return False
    flat = [
        x for y in inputs if y is not None for x in (y if isinstance(y, tuple | list) else (y,))
    ]
    return any(x.requires_grad for x in flat)


def _reference(t: Tokens, s: Settings, g: Tensor | None) -> tuple[Tensor, State]:
    note_backend("reference")
    bounds = t.cu_seqlens if t.cu_seqlens_cpu is None else t.cu_seqlens_cpu
    if bounds is not None:
        checks.check_bounds(bounds, t.q.shape[1])
    with no_autocast(t.q.device.type):
        return reference_gka(
            t.q, t.k, t.v, g, g if s.tied else t.gk, t.alpha, t.beta, (t.h0, t.u0), bounds,
            scale=s.scale, ridge_ratio=s.ridge_ratio, num_iter=s.num_iter,
        )  # fmt: skip


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    cu_seqlens_cpu: Tensor | None = None,
    context: SequenceContext | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention with a scalar decay per head: `chunk_gka` without its ridge.

    o_t = scale U_t^T q_t,  U_t = exp(g_t) U_{t-1} + k_t v_t^T.

    Arguments as in `chunk_gka`. The state is h_kv [N,H,K,V] alone; H is never formed. `backend` may also be
    "fla", the kernels of an installed flash-linear-attention: 16-bit inputs, chunks of 64 tokens, no `beta`,
    no second derivative (`gka.ops.why_not_external` tells more). "auto" prefers them where they can run.

    Raises:
        InputError (a ValueError): backend="fla" cannot run these inputs; the message says why.
    """
    if context is not None and backend in EXTERNAL:
        raise InputError(
            f"backend={backend!r} starts no packed sequence alone from a state: leave out context, "
            'or take backend="auto".'
        )
    library = None
    if context is None:
        library = _library(backend, q, k, v, g, beta, initial_state, chunk_size)
    if library is not None:
        checked = (q, k, v, g, None, None, None, initial_state, cu_seqlens, cu_seqlens_cpu)
        numbers = (scale, 1.0, 0, chunk_size, output_final_state, "chebyshev", False, "torch")
        _, settings = check_call(*checked, *numbers)
        q, k, v = autocast(q, k, v)
        given = Given(
            q, k, v, g, None, initial_state, cu_seqlens, settings.scale, output_final_state
        )
        return run_external(library, "simple_gla", given, cu_seqlens_cpu)
    o, final = run_call(
        "chunk", q, k, v, g, None, None, beta, scale=scale, ridge_ratio=1.0, num_iter=0,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu, backend=backend, chunk_size=chunk_size, with_h=False,
        context=context,
    )  # fmt: skip
    return o, None if final is None else final[1]


def _library(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> str | None:
    """The library that runs the call; None if `chunk_gka` does, which then checks it."""
    if backend in EXTERNAL and (beta is not None or chunk_size != 64):
        raise InputError(
            f"backend={backend!r} has chunks of 64 tokens and no write gate; got chunk_size={chunk_size}"
            f"{'' if beta is None else ' and beta'}."
        )
    known = (backend == "auto" and beta is None and chunk_size == 64) or backend in EXTERNAL
    if not known or not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return None
    q, k, v = autocast(q, k, v)
    wanted = [x for x in (k, g, state) if isinstance(x, Tensor)]
    return resolve_external(backend, "simple_gla", q, v, *wanted)
