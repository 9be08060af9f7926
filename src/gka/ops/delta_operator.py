# pyright: reportCallIssue=false
"""How a checked call of the delta rule runs: plain torch, or one operator to torch.compile and torch.export.

Eager calls are differentiated by autograd as they run. Their loops have as many rounds as there are
chunks (or tokens), and packed bounds are read, so no graph of them serves every length. A compiled graph
holds gka::delta_rule instead. Its derivative runs the call again and differentiates that, so that
nothing but the inputs is kept. Inside a compiled transform of torch.func the loops are traced as they are.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gka.maths.delta import delta_rule_chunks, delta_rule_sequence
from gka.maths.layout import chunk_layout
from gka.ops import checks
from gka.ops.library import operator, under_transform

CHUNK_SIZE = 64
_CU_SEQLENS, _NUM_TENSORS = 6, 8  # q .. state, cu_seqlens, cu_seqlens_cpu come first


def run(
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
        state: S_0 [N,H,K,V] in the dtype to compute in.
        stepwise: token by token, which may do without g and beta and needs all heads of k and v.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to T (compiled: when the graph runs).
    """
    as_operator = torch.compiler.is_compiling() and not under_transform()
    call = forward_op if as_operator else _run
    return call(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, stepwise)


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
    known = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if known is not None:
        checks.check_bounds(known, q.shape[1])
    inputs: list[Any] = [None if x is None else x.to(state.dtype) for x in (q, k, v, g, beta)]
    with torch.amp.autocast(q.device.type, enabled=False):
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
    """`delta_rule_sequence` on the batch, or on each sequence that `bounds` cuts from B = 1."""
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
    """`run` without a derivative; contiguous, and no result is an input."""
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
        results = _run(*leaves, cu_seqlens, cu_seqlens_cpu, scale, stepwise)  # pyright: ignore[reportArgumentType]
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
