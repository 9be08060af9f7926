"""The (gated) delta rule as a function, run in torch or by a library's kernels (`gka.ops.external`).

In torch, autograd differentiates eager calls as they run. Their loops take as many rounds as there are chunks
(or tokens), and packed bounds are read, so no graph of them serves every length. torch.compile and
torch.export see the operator gka::delta_rule instead. Its derivative runs the call again and differentiates
that, so only the inputs are kept. Inside a compiled torch.func transform the loops themselves are traced.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gka.maths.delta import delta_rule_chunks, delta_rule_sequence
from gka.maths.layout import chunk_layout
from gka.ops import checks
from gka.ops.backends import note_backend
from gka.ops.context import SequenceContext, carry, check_context, last_document, own_initial
from gka.ops.dispatch import no_autocast, operator, under_transform
from gka.ops.external import Given, Rule, check_name, resolve_external
from gka.ops.external_call import run_external

CHUNK_SIZE = 64
_CU_SEQLENS, _NUM_TENSORS = 6, 8  # q .. state, cu_seqlens, cu_seqlens_cpu come first


BACKENDS = ("auto", "torch")
"""Backends of `chunk_gated_delta_rule` besides the libraries of `gka.ops.external`."""


def run(*call: Any, stepwise: bool) -> tuple[Tensor, Tensor]:
    """`_run` of a call, or in a compiled graph its operator."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        note_backend("torch")
    as_operator = compiling and not under_transform()
    chosen: Callable[..., tuple[Tensor, Tensor]] = forward_op if as_operator else _run
    return chosen(*call, stepwise)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    stepwise: bool,
) -> tuple[Tensor, Tensor]:
    """o [B,T,H,V] in q's dtype and the final states [N,H,K,V], differentiable.

    Args:
        q: [B,T,H,K]. k: [B,T,Hk,K]. v: [B,T,Hv,V]. g, beta: [B,T,H].
        state: S_0 [N,H,K,V] in the dtype of the computation.
        stepwise: token by token. g and beta may then be None, and k and v must have all H heads.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to T (compiled: when the graph runs).
    """
    known = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if known is not None:
        checks.check_bounds(known, q.shape[1])
    inputs: list[Any] = [None if x is None else x.to(state.dtype) for x in (q, k, v, g, beta)]
    with no_autocast(q.device.type):
        if stepwise:
            bounds = None if known is None else known.tolist()
            o, state = _each_sequence(inputs, state, scale, bounds)
        else:
            layout = chunk_layout(q.shape[0], q.shape[1], CHUNK_SIZE, cu_seqlens, cu_seqlens_cpu)
            o, state = delta_rule_chunks(*inputs, state, scale=scale, layout=layout)  # pyright: ignore
    return o.to(q.dtype), state


def _each_sequence(
    inputs: Sequence[Any], state: Tensor, scale: float, bounds: list[int] | None
) -> tuple[Tensor, Tensor]:
    """`delta_rule_sequence` on the batch, or on each packed sequence between `bounds`."""
    if bounds is None:
        q, k, v, g, beta = inputs
        return delta_rule_sequence(q, k, v, g, beta, state, scale=scale)
    results = []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = [None if x is None else x[:, begin:end] for x in inputs]
        results.append(_each_sequence(part, state[n : n + 1], scale, None))
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, 1), torch.cat(states)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    stepwise: bool,
) -> tuple[Tensor, Tensor]:
    """`run` without a derivative; the results are contiguous and never alias an input."""
    note_backend("torch")
    with torch.no_grad():
        o, final = _run(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, stepwise)
    return o.contiguous(), final.clone() if final is state else final.contiguous()


forward_op = operator(delta_rule)


@torch.library.register_fake(forward_op)
def _(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, stepwise):
    return q.new_empty(*q.shape[:3], v.shape[-1]), state.new_empty(state.shape)


def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    do: Tensor,
    dstate: Tensor,
    scale: float,
    stepwise: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, g, beta, state; empty where the input is None."""
    given = (q, k, v, g, beta, state)
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        results = _run(*leaves, cu_seqlens, cu_seqlens_cpu, scale, stepwise)  # pyright: ignore[reportArgumentType, reportCallIssue]
    wanted = [x for x in leaves if x is not None]
    found = iter(
        torch.autograd.grad(
            results, wanted, (do, dstate), allow_unused=True, materialize_grads=True
        )
    )
    return [do.new_empty(0) if x is None else next(found).contiguous() for x in leaves]


backward_op = operator(delta_rule_backward)


@torch.library.register_fake(backward_op)
def _(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, do, dstate, scale, stepwise):
    given = (q, k, v, g, beta, state)
    return [do.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.options = inputs[_NUM_TENSORS:]


def _derive(ctx, do, dstate):
    tensors = ctx.saved_tensors
    found = backward_op(*tensors, do.contiguous(), dstate.contiguous(), *ctx.options)
    wanted = [None if x is None else dx for x, dx in zip(tensors[:_CU_SEQLENS], found, strict=True)]
    return *wanted, None, None, None, None


torch.library.register_autograd(forward_op, _derive, setup_context=_keep)


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
    backend: str = "auto",
    cu_seqlens_cpu: Tensor | None = None,
    context: SequenceContext | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t, by chunks.

    Without `g` it is DeltaNet (arXiv 2406.06484), with it Gated DeltaNet (arXiv 2412.06464). Keys should
    have 2-norm at most 1 and beta lie in [0, 1]; otherwise the state may grow without bound. Computes in
    float32 (float64 for float64 inputs).

    Args:
        q: queries [B,T,Hq,K]. k: keys [B,T,Hk,K]. v: values [B,T,Hv,V]. H, the number of states, is
            the largest of the three head counts. The others divide it, and consecutive heads share.
        g: log decay [B,T,H], <= 0; None for no decay.
        beta: write strength [B,T,H]; None for 1.
        scale: factor of the readout; None for K^-1/2.
        initial_state: S_0 [N,H,K,V]; None for zeros.
        output_final_state: whether to return the states after each sequence's last token.
        cu_seqlens: bounds [N+1] of sequences packed into B = 1; None for N = B sequences of T.
        backend: "auto", "torch" (any device), or an installed library's kernels, "flash_qla" or "fla"
            (NVIDIA GPUs, 16-bit inputs; they multiply in 16 bits and have no second derivative). "auto" takes
            the first library that can run the call, else torch. `gka.ops.available_external` lists the
            libraries that can run a call, `gka.ops.why_not_external` says why one cannot.
        cu_seqlens_cpu: a copy of cu_seqlens on the CPU; with it the call does not wait for the device.
        context: a sequence split over ranks, as in `chunk_gka`. The rule's map of an earlier state over a
            rank's tokens is a matrix [N,H,K,K], found by a second pass over the rank's last sequence.

    Returns:
        o [B,T,H,V] in the dtype of q, and the final states [N,H,K,V] or None.

    Raises:
        ValueError, TypeError: a shape, range or dtype is wrong; the message names the argument.
        InputError (a ValueError): the named library cannot run these inputs; the message says why.
    """
    check_name(backend, BACKENDS)
    checks.check_scale(scale)
    checks.check_flags(output_final_state=output_final_state)
    if context is not None:
        checks.check_tensors(q=q, k=k, v=v)
        check_context(context, q.shape[1] if q.dim() > 1 else 0, cu_seqlens)
        initial_state = _carried(context, q, k, v, g, beta, initial_state)
        cu_seqlens, cu_seqlens_cpu = context.cu_seqlens, context.cu_seqlens_cpu
    q, state = _prepare(q, k, v, g, beta, initial_state, cu_seqlens, cu_seqlens_cpu)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    rule: Rule = "delta_rule" if g is None else "gated_delta_rule"
    library = resolve_external(backend, rule, q, v, k, g, beta, initial_state)
    beta = q.new_ones(q.shape[:3]) if beta is None else beta
    if library is not None:
        given = Given(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state)
        return run_external(library, rule, given, cu_seqlens_cpu)
    g = q.new_zeros(q.shape[:3]) if g is None else g
    o, state = run(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, stepwise=False)
    return o, state if output_final_state else None


@torch.compiler.disable(reason="ranks exchange states: a graph cannot hold the collectives")
def _carried(
    context: SequenceContext, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    beta: Tensor | None, initial_state: Tensor | None,
) -> Tensor:  # fmt: skip
    """The states before this rank's tokens of each of its sequences [n,H,K,V].

    Over the rank's last sequence the state is A S_0 + E. Two passes find both: from zero, and from the
    identity with values of zero.
    """
    own = None if initial_state is None else own_initial(context, initial_state)
    q, zero = _prepare(q, k, v, g, beta, None, context.cu_seqlens, context.cu_seqlens_cpu)
    heads, (g, beta) = last_document(context, q, k, v), last_document(context, g, beta)
    q, k, v = (x for x in heads if x is not None)
    beta = q.new_ones(q.shape[:3]) if beta is None else beta
    g = q.new_zeros(q.shape[:3]) if g is None else g
    zero, (rows, heads, dim) = zero[: len(q)], (len(q), q.shape[2], q.shape[3])
    _, end = run(q, k, v, g, beta, zero, None, None, 1.0, stepwise=False)
    identity = torch.eye(dim, dtype=zero.dtype, device=zero.device).expand(rows, heads, dim, dim)
    empty = v.new_zeros(1).expand(*v.shape[:2], 1, dim)
    _, change = run(q, k, empty, g, beta, identity, None, None, 1.0, stepwise=False)
    return carry(context, [(change, end, own)])[0]


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
    """[B,T,h,D] -> [B,T,H,D], each head repeated for the consecutive heads that share it."""
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
    """Check the call; returns queries with all H heads and the initial states in the computation's dtype."""
    checks.check_tensors(q=q, k=k, v=v)
    if all(x.dim() == 4 for x in (q, k, v)) and q.shape[2] > 0:
        most = max(x.shape[2] for x in (q, k, v))
        q = _expand_heads(q, most) if most % q.shape[2] == 0 else q
    checks.check_inputs(q, k, v, g=g, beta=beta)
    sequences = checks.check_lengths(q, cu_seqlens, cu_seqlens_cpu)
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        return q, q.new_zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    checks.check_state("initial_state", initial_state, shape, q)
    return q, initial_state
