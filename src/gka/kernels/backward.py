"""The backward pass on a GPU, group of heads by group: scan again, adjoint, scan back, gradients."""

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
from gka.kernels.call import GpuCall, aligned
from gka.kernels.passes import Passes, execute
from gka.maths.adjoint import Gradients
from gka.maths.chunked import Settings, Tokens

CHUNK_HEADS = 792  # chunks times heads that are worked on together: bounds the scratch memory


def chunk_backward(
    passes: Passes,
    tokens: Tokens,
    x: Tensor | None,
    x_scale: Tensor | None,
    do: Tensor,
    dh_final: Tensor | None,
    du_final: Tensor | None,
    settings: Settings,
) -> Gradients:
    """`gka.maths.adjoint.chunk_backward` on the GPU; x and x_scale as `chunk_forward` gave them."""
    call = GpuCall(passes, tokens, settings)
    call.split_heads(CHUNK_HEADS)
    if x is not None and x_scale is None:  # of the recurrent form
        x_scale = x.abs().amax(-1)
        x = (x / x_scale.clamp_min(1e-37)[..., None]).to(call.sizes.op_dtype)
    with_h = call.solves or dh_final is not None
    call.signature = (*call.signature, do.dtype, dh_final is None, du_final is None)
    solutions = Solutions(aligned(x), aligned(x_scale))
    back = BackwardArrays(
        solutions, aligned(do), *call.boundaries(dh_final, du_final), _input_gradients(call, with_h)
    )
    for heads in call.groups:
        group = _group(passes, call, heads, back, with_h)
        execute(passes.scan(call, heads, group.h, group.u, group.maxima))
        execute(passes.adjoint(call, group, back))
        execute(passes.scan_back(call, group, back))
        execute(passes.gradients(call, group, back))
        _sum_shared(call, heads, back.grads.dk, group.dk, call.HK)
        _sum_shared(call, heads, back.grads.dv, group.dv, call.HV)
    return _collect(call, back.grads)


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
    passes: Passes, call: GpuCall, heads: Heads, back: BackwardArrays, with_h: bool
) -> Group:
    h, u = call.moments(heads, with_h, final=False)
    ends_h, ends_u = passes.ends(call, heads, h, u)
    return Group(
        heads=heads,
        h=h,
        u=u,
        maxima=call.maxima(heads),
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
    """The gradient itself where no heads share, else scratch that is summed afterwards."""
    if of == call.H:
        return HeadPart(grad, heads.base, call.H)
    shape = (*call.t.q.shape[:2], heads.count, grad.shape[-1])
    return HeadPart(call.scratch(name, *shape), 0, heads.count)


def _sum_shared(call: GpuCall, heads: Heads, grad: Tensor, part: HeadPart, of: int) -> None:
    """Add up what heads that share a key or a value head found."""
    if of == call.H:
        return
    first, share = heads.base * of // call.H, call.H // of
    shape = (*grad.shape[:2], heads.count // share, share, grad.shape[-1])
    total = part.array.view(-1)[: prod(shape)].view(shape).sum(3)
    grad[:, :, first : first + heads.count // share] = total


def _collect(call: GpuCall, grads: InputGradients) -> Gradients:
    """Gradients in their inputs' dtypes."""
    t, dg_u, dg_h = call.given, grads.dg_u, grads.dg_h
    if call.settings.tied and dg_u is not None and dg_h is not None:
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
