"""The backward pass on a GPU, group of heads by group: scan again, adjoint, scan back, gradients.

Where the forward pass has kept the states, there is no second scan, and all heads are one group.
"""

from math import prod

import torch
from torch import Tensor

from gka.kernels.arrays import (
    Adjoint,
    BackwardArrays,
    Group,
    HeadPart,
    Heads,
    InputGradients,
    Solutions,
)
from gka.kernels.call import GpuCall, aligned, op_dtype, packed_chunks, prepared
from gka.kernels.kept import kept_states
from gka.kernels.passes import Executor, Launch, Passes, execute
from gka.kernels.replay import Ran, Recordings, apart, kind_of
from gka.maths.adjoint import Gradients
from gka.maths.chunked import Settings, Tokens

# Chunks times heads of a group, which bounds the scratch memory: 16 times what 132 multiprocessors
# hold at once. Smaller groups leave more of them idle at each group's end.
CHUNK_HEADS = 4224
RECORDINGS = Recordings()


def chunk_backward(
    passes: Passes,
    tokens: Tokens,
    x: Tensor | None,
    x_scale: Tensor | None,
    do: Tensor,
    dh_final: Tensor | None,
    du_final: Tensor | None,
    settings: Settings,
    kept: Tensor | None = None,
) -> Gradients:
    """`gka.maths.adjoint.chunk_backward` on the GPU, from `chunk_forward`'s x, x_scale and kept."""
    t = prepared(tokens, passes.float_gates)
    if x is not None and x_scale is None:  # from the recurrent form
        x_scale = x.abs().amax(-1)
        x = (x / x_scale.clamp_min(1e-37)[..., None]).to(op_dtype(t.q.dtype))
    after = tuple(aligned(y) for y in (x, x_scale, do, dh_final, du_final, kept))
    missing = (dh_final is None, du_final is None, kept is None)
    chunks = None if t.cu_seqlens is None else packed_chunks(passes, t, settings)
    tables = () if chunks is None else chunks.tables
    kind = kind_of(passes, t, settings, chunks, do.dtype, missing, CHUNK_HEADS)
    many = chunks is not None and chunks.num_chunks * t.q.shape[2] > CHUNK_HEADS
    if many and kept is None:
        kind = None  # groups of heads cut packed sequences anew
    if kind is None:
        call = GpuCall(passes, t, settings, chunks)
        return _collect(tokens, settings, _run(passes, call, after, execute))

    def record(execute: Executor) -> Ran:
        call = GpuCall(passes, apart(t), settings, chunks)
        mine = tuple(None if y is None else y.detach() for y in after)
        given = (*call.t.inputs, *mine, *tables)
        return Ran(call, given, _run(passes, call, mine, execute))

    made = RECORDINGS.run(kind, (*t.inputs, *after, *tables), record)
    return _collect(tokens, settings, InputGradients(*made))


def _run(
    passes: Passes, call: GpuCall, after: tuple[Tensor | None, ...], execute: Executor
) -> InputGradients:
    """All launches of the pass. after: x, x_scale, do, dh_final, du_final, kept."""
    x, x_scale, do, dh_final, du_final, kept = after
    assert do is not None
    if kept is None:
        call.split_heads(CHUNK_HEADS)
    with_h = call.solves or dh_final is not None
    call.signature = (*call.signature, do.dtype, dh_final is None, du_final is None)
    back = BackwardArrays(
        Solutions(x, x_scale),
        do,
        *call.boundaries(dh_final, du_final),
        _input_gradients(call, with_h),
    )
    for heads in call.groups:
        group = _group(passes, call, heads, back, with_h, kept)
        if kept is None:
            execute(passes.scan(call, heads, group.h, group.u, group.maxima))
        execute(passes.adjoint(call, group, back))
        execute(passes.scan_back(call, group, back))
        execute(passes.gradients(call, group, back))
        execute(_sum_shared(call, heads, back.grads.dk, group.dk, call.HK))
        execute(_sum_shared(call, heads, back.grads.dv, group.dv, call.HV))
    return back.grads


def _input_gradients(call: GpuCall, with_h: bool) -> InputGradients:
    t = call.t
    dalpha, dg_h = call.like(t.alpha), call.like(call.gk)
    if dalpha is not None and not call.solves:
        dalpha.zero_()
    if dg_h is not None and not with_h:
        dg_h.zero_()
    return InputGradients(
        dq=torch.empty_like(t.q),
        dk=torch.empty_like(t.k),
        dv=torch.empty_like(t.v),
        dg_u=call.like(t.g),
        dg_h=dg_h,
        dalpha=dalpha,
        dbeta2=call.like(t.beta),
        dh0=None if t.h0 is None or not with_h else call.empty(*t.h0.shape),
        du0=None if t.u0 is None else call.empty(*t.u0.shape),
    )


def _group(
    passes: Passes,
    call: GpuCall,
    heads: Heads,
    back: BackwardArrays,
    with_h: bool,
    kept: Tensor | None,
) -> Group:
    if kept is None:
        (h, u), maxima = call.moments(heads, with_h, final=False), call.maxima(heads)
    else:
        states = kept_states(call, kept, final=False)
        h, u, maxima = states.h if with_h else None, states.u, states.maxima(call)
    ends_h, ends_u = passes.ends(call, heads, h, u)
    return Group(
        heads=heads,
        h=h,
        u=u,
        maxima=maxima,
        adjoint=_adjoint(call, heads) if call.solves else None,
        start_u=call.scratch("start u", *call.t.q.shape[:2], heads.count),
        ends_h=ends_h,
        ends_u=ends_u,
        dk=_part(call, heads, "dk", back.grads.dk, call.HK),
        dv=_part(call, heads, "dv", back.grads.dv, call.HV),
    )


def _adjoint(call: GpuCall, heads: Heads) -> Adjoint:
    shape = (*call.t.q.shape[:2], heads.count)
    names = ("y_scale", "w_t", "start_h", "key_weight")
    numbers = {name: call.scratch(f"adjoint {name}", *shape) for name in names}
    y = call.scratch("y", *shape, call.K, dtype=call.sizes.op_dtype)
    return Adjoint(y, **numbers, start_weight=call.scratch("start weight", call.M, heads.count))


def _part(call: GpuCall, heads: Heads, name: str, grad: Tensor, of: int) -> HeadPart:
    """The gradient itself if no heads share, else scratch that is summed afterwards."""
    if of == call.H:
        return HeadPart(grad, heads.base, call.H)
    shape = (*call.t.q.shape[:2], heads.count, grad.shape[-1])
    return HeadPart(call.scratch(name, *shape), 0, heads.count)


def _sum_shared(call: GpuCall, heads: Heads, grad: Tensor, part: HeadPart, of: int) -> list[Launch]:
    """Sum the gradients of the heads that share a key or value head."""
    if of == call.H:
        return []
    return [
        Launch(
            _add_up, (), (grad, part.array, heads.base * of // call.H, heads.count, call.H // of)
        )
    ]


def _add_up(_, grad: Tensor, part: Tensor, first: int, heads: int, share: int) -> None:
    """Write to grad[:, :, first:] the sums over each `share` consecutive ones of the `heads` in `part`."""
    shape = (*grad.shape[:2], heads // share, share, grad.shape[-1])
    grad[:, :, first : first + heads // share] = part.view(-1)[: prod(shape)].view(shape).sum(3)


def _collect(t: Tokens, settings: Settings, grads: InputGradients) -> Gradients:
    """Gradients in their inputs' dtypes."""
    dg_u, dg_h = grads.dg_u, grads.dg_h
    if settings.tied and dg_u is not None and dg_h is not None:
        dg_u += dg_h
    dbeta = None
    if grads.dbeta2 is not None and t.beta is not None:
        dbeta = grads.dbeta2.mul_(t.beta).mul_(2.0)
    dh0 = grads.dh0
    if dh0 is not None:  # H is symmetric, and so is its gradient
        dh0 = (dh0 + dh0.transpose(-1, -2)) / 2
    elif t.h0 is not None:
        dh0 = torch.zeros_like(t.h0)

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if like is None or grad is None else grad.to(like.dtype)

    return Gradients(
        q=grads.dq,
        k=grads.dk,
        v=grads.dv,
        g=cast(dg_u, t.g),
        gk=cast(dg_h, t.gk),
        alpha=cast(grads.dalpha, t.alpha),
        beta=cast(dbeta, t.beta),
        h0=cast(dh0, t.h0),
        u0=cast(grads.du0, t.u0),
    )
