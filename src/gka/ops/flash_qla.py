"""flash-qla's delta rule as the operators gka::flash_qla and gka::flash_qla_backward, for compiled graphs.

The forward operator also returns what the backward pass needs: the sums of log decays within chunks and the
inverses A of the chunks' triangular systems, [B,T,H,64]. Where the library splits a sequence to fill the
GPU, it splits it alike in both passes (`is_train`); what it caches for that is computed again.
"""

from typing import Any

import torch
from torch import Tensor

from gka.ops import checks
from gka.ops.autograd import no_autocast, operator
from gka.ops.backends import current, note_backend
from gka.ops.external import Given, loaded

CHUNK = 64


def compiled(x: Given, cu_seqlens_cpu: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
    """Gradients of q, k, v, g, beta and the initial states (empty without any)."""
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
    *tensors, state, cu_seqlens = ctx.saved_tensors
    dstate = dstate.contiguous() if ctx.final else None
    found = backward_op(*tensors, state, cu_seqlens, do.contiguous(), dstate, ctx.scale)
    before = None if state is None else found[5]
    return *found[:5], before, None, None, None, None


torch.library.register_autograd(forward_op, _derive, setup_context=_keep)
