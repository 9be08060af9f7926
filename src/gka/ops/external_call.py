"""A checked call of a baseline's memory, run by the kernels of an installed library (`gka.ops.external`).

Inputs that the libraries do not accept are converted: shared heads are repeated, empty sequences removed, and
a call without tokens never reaches them. torch.compile sees flash-qla's kernels as an operator. It breaks its
graph at flash-linear-attention's functions, which their authors exclude from compilation.
"""

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from gka.ops import checks
from gka.ops.backends import current, note_backend
from gka.ops.dispatch import keep_signature, no_autocast, operator
from gka.ops.external import EXTERNAL, Given, Rule, loaded

State = Tensor | None


def run_external(
    name: str, rule: Rule, given: Given, cu_seqlens_cpu: Tensor | None
) -> tuple[Tensor, State]:
    """o [B,T,H,V] in q's dtype, and the final states [N,H,K,V] in float32 if `given.final`.

    Args:
        name: the library, which can run the call.
        given: the call; k and v may share heads, sequences may be empty, scale may be 0, gates of any dtype.
        cu_seqlens_cpu: the bounds' copy on the CPU, if there is one.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to T.
    """
    whole = _whole(given)
    if name == "flash_qla" and whole.q.numel() > 0 and _observed(whole, cu_seqlens_cpu):
        return flash_qla_operator(whole, cu_seqlens_cpu)
    return _uncompiled(name, rule, whole, cu_seqlens_cpu)


def _observed(x: Given, copy: Tensor | None) -> bool:
    """Whether the call must be one operator: to a compiler, or to a dispatch mode.

    Selective checkpointing is such a mode, and keeps results of operators. The operator takes no empty
    sequences.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    known = x.cu_seqlens if copy is None else copy
    if known is None:
        return True
    checks.check_bounds(known, x.q.shape[1])
    return filled(known) is None


def _whole(x: Given) -> Given:
    """The call with all heads of k and v, float32 gates and int64 bounds; scale 0 becomes zero queries."""
    heads = x.q.shape[2]
    k, v = (
        y if y.shape[2] == heads else y.repeat_interleave(heads // y.shape[2], 2)
        for y in (x.k, x.v)
    )
    g, beta = (None if y is None else y.float() for y in (x.g, x.beta))
    bounds = None if x.cu_seqlens is None else x.cu_seqlens.long()
    q, scale = (x.q, x.scale) if x.scale else (x.q * 0, 1.0)
    return replace(x, q=q, k=k, v=v, g=g, beta=beta, cu_seqlens=bounds, scale=scale)


def _run(name: str, rule: Rule, x: Given, copy: Tensor | None) -> tuple[Tensor, State]:
    """Run outside compiled graphs, where lengths can be read."""
    note_backend(name)
    places = None
    if x.cu_seqlens is not None:
        known = x.cu_seqlens if copy is None else copy
        checks.check_bounds(known, x.q.shape[1])
        places = filled(known)
    if x.q.numel() == 0:
        return without_tokens(x)
    with no_autocast(x.q.device.type), current(x.q.device):
        o, state = EXTERNAL[name].run(rule, x if places is None else _filled(x, places))
    o, state = Once.apply(o, state)
    if state is not None and places is not None:
        # an empty sequence keeps its state
        before = _zeros(x) if x.state is None else x.state
        state = before.index_copy(0, places, state)
    return o, state


_uncompiled: Any = torch.compiler.disable(_run)


def filled(bounds: Tensor) -> Tensor | None:
    """Indices of the sequences that are not empty, on the CPU; None if none is empty."""
    lengths = bounds.diff()
    empty = (lengths == 0).cpu()
    return (~empty).nonzero().flatten() if bool(empty.any()) else None


def _filled(x: Given, places: Tensor) -> Given:
    """The call without its empty sequences."""
    assert x.cu_seqlens is not None
    state = None if x.state is None else x.state[places.to(x.state.device)]
    return replace(x, cu_seqlens=x.cu_seqlens.unique_consecutive(), state=state)


def _zeros(x: Given) -> Tensor:
    sequences = x.q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    shape = (sequences, x.q.shape[2], x.q.shape[3], x.v.shape[3])
    return x.q.new_zeros(shape, dtype=torch.float32)


def without_tokens(x: Given) -> tuple[Tensor, State]:
    """The result of a call without tokens: the states are unchanged."""
    o = x.q.new_zeros(*x.q.shape[:3], x.v.shape[3])
    if not x.final:
        return o, None
    return o, _zeros(x) if x.state is None else x.state.clone()


class Once(torch.autograd.Function):
    """The identity; refuses a second derivative, of which the libraries would compute only a part."""

    @staticmethod
    def forward(ctx: Any, *outputs: State) -> tuple[State, ...]:
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.view_as(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: State) -> tuple[State, ...]:
        if torch.is_grad_enabled():
            refuse_second()
        return grads


def refuse_second() -> NoReturn:
    """Raise the error of a second derivative."""
    raise RuntimeError(
        'the kernels of installed libraries have no second derivative. Use backend="torch" for it.'
    )


keep_signature(Once)


# flash-qla's delta rule as the operators gka::flash_qla and gka::flash_qla_backward, for compiled graphs and
# selective checkpointing. The forward operator also returns what the backward pass needs: the sums of log
# decays within chunks and the inverses A of the chunks' triangular systems, [B,T,H,64].
# Where the library splits a sequence to fill the GPU, it splits it alike in both passes (`is_train`); what it
# caches for that is recomputed.
CHUNK = 64


def flash_qla_operator(x: Given, cu_seqlens_cpu: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The call as an operator; when the graph runs, it refuses bounds that do not rise from 0 to T."""
    g = torch.zeros_like(x.q[..., 0], dtype=torch.float32) if x.g is None else x.g
    beta = torch.ones_like(g) if x.beta is None else x.beta
    o, state, _, _ = forward_op(
        x.q, x.k, x.v, g, beta, x.state, x.cu_seqlens, cu_seqlens_cpu, x.scale, x.final
    )
    return o, state if x.final else None


def _check(q: Tensor, cu_seqlens: Tensor | None, copy: Tensor | None) -> None:
    known = cu_seqlens if copy is None else copy
    if known is None:
        return
    checks.check_bounds(known, q.shape[1])
    if bool((known.diff() == 0).any()):
        raise ValueError(
            "cu_seqlens holds an empty sequence, which flash-qla's kernels do not take in a compiled graph: "
            'leave it out, or choose backend="torch".'
        )


def flash_qla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final states or an empty tensor, sums of g within chunks, inverses)."""
    _check(q, cu_seqlens, cu_seqlens_cpu)
    note_backend("flash_qla")
    module: Any = loaded("flash_qla")
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    with torch.no_grad(), no_autocast(q.device.type), current(q.device):
        sums, inverse, o, _, after, _ = module.chunk_gated_delta_rule_fwd(
            q=q, k=k, v=v, g=g, beta=beta, scale=scale,
            initial_state=None if state is None else state.contiguous(), cu_seqlens=cu_seqlens,
            output_final_state=final, enable_fwd_cp_cache=False, is_train=True,
        )  # fmt: skip
    after = q.new_empty(0, dtype=torch.float32) if after is None else after
    return o.to(q.dtype).contiguous(), after.contiguous(), sums.contiguous(), inverse.contiguous()


forward_op = operator(flash_qla)


@torch.library.register_fake(forward_op)
def _(q, k, v, g, beta, state, cu_seqlens, cu_seqlens_cpu, scale, final):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3]) if final else (0,)
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(shape, dtype=torch.float32),
        g.new_empty(g.shape),
        k.new_empty(*q.shape[:3], CHUNK),
    )


def flash_qla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    beta: Tensor,
    inverse: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dstate: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, g, beta and the initial states (empty if state is None)."""
    note_backend("flash_qla")
    module: Any = loaded("flash_qla")
    with torch.no_grad(), no_autocast(q.device.type), current(q.device):
        dq, dk, dv, dbeta, dg, before = module.chunk_gated_delta_rule_bwd(
            q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), g=sums, beta=beta.contiguous(),
            A=inverse, do=do.contiguous(), dht=dstate, scale=scale, cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.contiguous(),
        )  # fmt: skip
    found = [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.float(), dbeta.float()]
    none = q.new_empty(0, dtype=torch.float32)
    found.append(none if state is None or before is None else before.to(state.dtype))
    return [x.contiguous() for x in found]


backward_op = operator(flash_qla_backward)


@torch.library.register_fake(backward_op)
def _(q, k, v, sums, beta, inverse, state, cu_seqlens, do, dstate, scale):
    shapes = [x.new_empty(x.shape) for x in (q, k, v, sums, beta)]
    before = sums.new_empty(0) if state is None else state.new_empty(state.shape)
    return [*shapes, before]


def _keep(ctx, inputs, output) -> None:
    q, k, v, _, beta, state, cu_seqlens, _, scale, final = inputs
    _, _, sums, inverse = output
    ctx.mark_non_differentiable(sums, inverse)
    ctx.save_for_backward(q, k, v, sums, beta, inverse, state, cu_seqlens)
    ctx.scale, ctx.final = scale, final


def _derive(ctx, do, dstate, *_):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        refuse_second()
    *tensors, state, cu_seqlens = ctx.saved_tensors
    dstate = dstate.contiguous() if ctx.final else None
    found = backward_op(*tensors, state, cu_seqlens, do.contiguous(), dstate, ctx.scale)
    before = None if state is None else found[5]
    return *found[:5], before, None, None, None, None


torch.library.register_autograd(forward_op, _derive, setup_context=_keep)
