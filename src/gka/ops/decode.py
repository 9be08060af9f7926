"""Decoding with states updated in place: fused_recurrent_gka_ and advance_states_."""

import os

import torch
from torch import Tensor
from torch.profiler import record_function

from gka.maths.chunked import Settings, Tokens
from gka.maths.recurrent import States
from gka.ops import checks
from gka.ops.backends import Call, Stepper, resolve_backend, running_backend
from gka.ops.dispatch import autocast, no_autocast, operator

MAX_TOKENS = 64


def fused_recurrent_gka_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int = 30,
    *,
    state: tuple[Tensor | None, Tensor],
    state_indices: Tensor | None = None,
    commit: bool = True,
    beta: Tensor | None = None,
    backend: str = "auto",
    solver: str = "chebyshev",
) -> Tensor:
    """`fused_recurrent_gka` of up to 64 tokens per sequence, in one launch that updates the states in place.

    Not differentiable. The GPU backends do not wait for the device and may be captured in a CUDA graph;
    "torch" may wait. For speculative decoding, run the drafted tokens with
    commit=False and commit the accepted ones by `advance_states_`.

    Args:
        q, k, v, g, gk, alpha, scale, ridge_ratio, num_iter, beta, solver: as in `fused_recurrent_gka`.
        state: (h_kk [P,H,K,K], h_kv [P,H,K,V]) of P sequences, float32 (float64 for float64 inputs), each
            state contiguous. h_kv may be bfloat16 where q is not float64: arithmetic is float32, and it
            is rounded when it is stored, once per call. h_kk may be None with num_iter = 0.
        state_indices: place of each sequence among the P, int32 or int64 [B]; each place at most once. Index
            -1 means no place: the output is zero. None: P = B, sequence b has place b.
        commit: whether the states are updated. False leaves them untouched.
        backend: "auto", "hopper" (K and V 64 or 128 on H100, H200), "triton" (NVIDIA GPUs) or "torch";
            `available_backends(..., mode="step")` lists what can run.

    Returns:
        o [B,T,H,V] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, range or dtype is wrong; the states are unchanged. Indices outside
            -1..P-1 or given twice raise on the CPU, and on a GPU with GKA_DEBUG=1, since reading them waits
            for the device. Without it a GPU treats indices outside as -1, and the states of a place given
            twice are undefined.
        RuntimeError: the named backend cannot run these inputs, or a gradient is needed.
    """
    checks.check_tensors(q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    checks.check_inputs(q, k, v, g=g, gk=gk, alpha=alpha, beta=beta)
    checks.check_numbers(ridge_ratio, num_iter, 64, scale)
    checks.check_flags(commit=commit)
    h, u = checks.check_pool(state, state_indices, q, v, num_iter > 0)
    _check_call(q, state_indices, u.shape[0], k=k, v=v, g=g, gk=gk, alpha=alpha, beta=beta)
    name = resolve_step(backend, q, v, solver)
    if num_iter > 0 and os.environ.get("GKA_DEBUG") == "1":
        checks.check_key_norms(k, name)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    tied = gk is not None and gk is g
    return step_op(
        q, k, v, g, None if tied else gk, alpha, beta, h, u, state_indices, scale, float(ridge_ratio),
        num_iter, tied, commit, solver, name,
    )  # fmt: skip


def advance_states_(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    *,
    counts: Tensor,
    state: tuple[Tensor, Tensor],
    state_indices: Tensor | None = None,
    beta: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Commit the first counts[b] tokens of each sequence: decay and update of the states, no output.

    After `fused_recurrent_gka_` with commit=False, the states become those of a call with commit=True on
    the accepted tokens alone.

    Args:
        k, v, g, gk, beta, state, state_indices: as in `fused_recurrent_gka_`.
        counts: accepted tokens of each sequence, int32 or int64 [B] on k's device; clamped to 0..T. On a
            GPU the host does not read it.
        backend: as in `fused_recurrent_gka_`.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_recurrent_gka_`.
    """
    checks.check_tensors(k=k, v=v)
    k, v = autocast(k, v)
    if k.dim() != 4:
        raise ValueError(f"k must have 4 dimensions [B, T, heads, dim]; got {list(k.shape)}.")
    heads = checks.heads_of(state)
    q = k.new_empty(1, 1, 1, 1).expand(*k.shape[:2], heads, k.shape[3])  # only its shape is used
    checks.check_inputs(q, k, v, g=g, gk=gk, beta=beta)
    h, u = checks.check_pool(state, state_indices, q, v, True)
    checks.check_integers("counts", counts, q)
    _check_call(q, state_indices, u.shape[0], k=k, v=v, g=g, gk=gk, beta=beta)
    name = resolve_step(backend, q, v, "chebyshev")
    tied = gk is not None and gk is g
    advance_op(k, v, g, None if tied else gk, beta, h, u, state_indices, counts, tied, name)


def _check_call(q: Tensor, indices: Tensor | None, places: int, **inputs: Tensor | None) -> None:
    """Check length and gradients, and values where they can be read without waiting."""
    if q.shape[1] > MAX_TOKENS:
        raise ValueError(
            f"a call takes at most {MAX_TOKENS} tokens a sequence; got T = {q.shape[1]}. "
            "Use chunk_gka with initial_state for longer ones."
        )
    given = [q, *(x for x in inputs.values() if x is not None)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise RuntimeError(
            "states updated in place have no gradient: call under torch.no_grad(), "
            "or use fused_recurrent_gka."
        )
    debug = os.environ.get("GKA_DEBUG") == "1"
    if debug:
        checks.check_values(q=q, **inputs)
    if indices is not None and (debug or indices.device.type == "cpu"):
        checks.check_places(indices, places)


def resolve_step(backend: str, q: Tensor, v: Tensor, solver: str) -> str:
    """The backend of a call that updates states in place; raises RuntimeError if it cannot run it."""
    dims = (q.shape[-1], v.shape[-1])
    call = Call(q.device, q.dtype, checks.check_solver(solver), dims, mode="step")
    return resolve_backend(backend, call)


def _stepper(backend: str) -> Stepper:
    stepper = running_backend(backend).stepper
    assert stepper is not None
    return stepper


def _changed(*states: Tensor | None) -> None:
    """Bump autograd's version counters, so that a graph that saved a state raises an error."""
    for state in states:
        if state is not None and not state.is_inference():
            torch.autograd.graph.increment_version(state)


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    h: Tensor | None,
    u: Tensor,
    indices: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    tied: bool,
    commit: bool,
    solver: str,
    backend: str,
) -> Tensor:
    """o [B,T,H,V]; h and u are updated if `commit`."""
    tokens = Tokens(q, k, v, g, gk, alpha, beta, None, None, None)
    settings = Settings(
        scale, ridge_ratio, num_iter, 64, tied, h is not None, checks.check_solver(solver)
    )
    with no_autocast(q.device.type), record_function("gka.step"):
        o = _stepper(backend).step(tokens, settings, States(h, u, indices), commit)
    if commit:
        _changed(h, u)
    return o


def advance_(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    h: Tensor,
    u: Tensor,
    indices: Tensor | None,
    counts: Tensor,
    tied: bool,
    backend: str,
) -> None:
    """Update h and u by the first counts[b] tokens."""
    q = k.new_empty(1, 1, 1, 1).expand(*k.shape[:2], h.shape[1], k.shape[3])
    tokens = Tokens(q, k, v, g, gk, None, beta, None, None, None)
    settings = Settings(1.0, 1.0, 0, 64, tied, True)
    with no_autocast(k.device.type), record_function("gka.advance"):
        _stepper(backend).advance(tokens, settings, States(h, u, indices), counts)
    _changed(h, u)


step_op = operator(step_, ("h", "u"))
advance_op = operator(advance_, ("h", "u"))


@torch.library.register_fake(step_op)
def _(
    q, k, v, g, gk, alpha, beta, h, u, indices, scale, ridge_ratio, num_iter, tied, commit, solver, backend,
):  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.register_fake(advance_op)
def _(k, v, g, gk, beta, h, u, indices, counts, tied, backend):
    return None
