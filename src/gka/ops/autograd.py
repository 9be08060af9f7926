"""The torch operators gka::forward and gka::backward: opaque to torch.compile, differentiable by autograd.

One pair serves every mode and backend. An absent state is None as an argument and an empty tensor as a
result, because operators return tensors only.
"""

from typing import Any

import torch
from torch import Tensor

from gka.maths.chunked import Settings, Tokens
from gka.ops import checks
from gka.ops.backends import get_backend, running_backend
from gka.ops.dispatch import inside, keep_signature, operator

_CU_SEQLENS, _NUM_TENSORS = 9, 11  # q .. cu_seqlens, cu_seqlens_cpu come first


def pack(tokens: Tokens, settings: Settings) -> tuple[Any, ...]:
    """The operators' arguments: 11 tensors, then 8 numbers."""
    s = settings
    return (
        *tokens, s.scale, s.ridge_ratio, s.num_iter, s.chunk_size, s.tied, s.with_h, s.solver,
        s.keep_states,
    )  # fmt: skip


def unpack(*arguments: Any) -> tuple[Tokens, Settings]:
    """The inverse of `pack`."""
    return Tokens(*arguments[:_NUM_TENSORS]), Settings(*arguments[_NUM_TENSORS:])


def _optional(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    chunk_size: int,
    tied: bool,
    with_h: bool,
    solver: str,
    keep_states: bool,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, x, x's scales, final H, final U, states kept for the backward pass).

    Empty: x without a solve, the scales if x is not scaled, H if it is not formed, the states if not kept.
    """
    tokens, settings = unpack(
        q, k, v, g, gk, alpha, beta, h0, u0, cu_seqlens, cu_seqlens_cpu,
        scale, ridge_ratio, num_iter, chunk_size, tied, with_h, solver, keep_states,
    )  # fmt: skip
    return _forward(tokens, settings, mode, backend)


def _forward(
    t: Tokens, settings: Settings, mode: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if t.cu_seqlens is not None:
        checks.check_bounds(
            t.cu_seqlens if t.cu_seqlens_cpu is None else t.cu_seqlens_cpu, t.q.shape[1]
        )
    runs = running_backend(backend).forward
    with inside("gka.forward", t.q.device.type):
        out = runs["recurrent" if mode == "recurrent" else "chunk"](t, settings)
    # The fake implementation promises the compiler contiguous results.
    x, x_scale, h = (_optional(y, out.u) for y in (out.x, out.x_scale, out.h))
    kept = out.u.new_empty(0, dtype=torch.uint8) if out.kept is None else out.kept
    return out.o.contiguous(), x, x_scale, h, out.u.contiguous(), kept


forward_op = operator(forward)


@torch.library.register_fake(forward_op)
def _(*arguments):
    *packed, mode, backend = arguments
    t, s = unpack(*packed)
    batch, length, heads, key_dim = t.q.shape
    sequences = batch if t.cu_seqlens is None else t.cu_seqlens.shape[0] - 1
    solve = s.num_iter > 0
    scaled = get_backend(backend).scaled_dtype if solve and mode != "recurrent" else None
    x_shape = (batch, length, heads, key_dim) if solve else (0,)
    scale_shape = (batch, length, heads) if scaled else (0,)
    h_shape = (sequences, heads, key_dim, key_dim) if solve or s.with_h else (0,)
    value_dim, work = t.v.shape[-1], t.work_dtype
    keeps = get_backend(backend).kept_shape if s.keep_states and mode != "recurrent" else None
    return (
        t.q.new_empty(batch, length, heads, value_dim),
        t.q.new_empty(x_shape, dtype=scaled(t.q.dtype) if scaled else work),
        t.q.new_empty(scale_shape, dtype=work),
        t.q.new_empty(h_shape, dtype=work),
        t.q.new_empty((sequences, heads, key_dim, value_dim), dtype=work),
        t.q.new_empty(keeps(t, s) if keeps else (0,), dtype=torch.uint8),
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    kept: Tensor,
    do: Tensor,
    dh: Tensor | None,
    du: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    chunk_size: int,
    tied: bool,
    with_h: bool,
    solver: str,
    keep_states: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of q, k, v, g, gk, alpha, beta, h0, u0; empty where the input is None."""
    tokens, settings = unpack(
        q, k, v, g, gk, alpha, beta, h0, u0, cu_seqlens, cu_seqlens_cpu,
        scale, ridge_ratio, num_iter, chunk_size, tied, with_h, solver, keep_states,
    )  # fmt: skip
    return _backward(tokens, settings, (x, x_scale, kept), do, dh, du, backend)


def _backward(
    tokens: Tokens, settings: Settings, made: tuple[Tensor, Tensor, Tensor], do: Tensor,
    dh: Tensor | None, du: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    """made: x, its scales and the kept states, from the forward pass."""
    run, (x, x_scale, kept) = running_backend(backend).backward, made
    with inside("gka.backward", do.device.type):
        solutions = x if settings.num_iter > 0 else None
        scales = x_scale if x_scale.numel() > 0 else None
        states = kept if kept.numel() > 0 else None
        grads = run(tokens, solutions, scales, do, dh, du, settings, states)
    optional = (grads.g, grads.gk, grads.alpha, grads.beta, grads.h0, grads.u0)
    heads = (grads.q.contiguous(), grads.k.contiguous(), grads.v.contiguous())
    return [*heads, *(_optional(grad, do) for grad in optional)]


backward_op = operator(backward)


@torch.library.register_fake(backward_op)
def _(*arguments):
    do = arguments[_NUM_TENSORS + 3]

    def like(given: Tensor | None) -> Tensor:
        return do.new_empty(0) if given is None else given.new_empty(given.shape)

    return [like(given) for given in arguments[:_CU_SEQLENS]]


def _vmap(op):
    """The vmap rule of an operator: fold the mapped dimension into the batch, and unfold the results."""

    def rule(info, in_dims, *inputs):
        if inputs[_CU_SEQLENS] is not None:
            raise RuntimeError(
                "torch.vmap cannot map over packed sequences: "
                "pack them all with one cu_seqlens, or pass sequences of one length as a batch."
            )

        def fold(x, dim: int | None):
            if not isinstance(x, Tensor) or (x.numel() == 0 and dim is None):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        outputs = op(*(fold(x, dim) for x, dim in zip(inputs, in_dims, strict=True)))
        unfolded = [y.unflatten(0, (info.batch_size, -1)) if y.numel() else y for y in outputs]
        return type(outputs)(unfolded), type(outputs)(0 if y.numel() else None for y in outputs)

    return rule


torch.library.register_vmap(forward_op, _vmap(forward_op))
torch.library.register_vmap(backward_op, _vmap(backward_op))


class GKABackward(torch.autograd.Function):
    """gka::backward; its own derivative raises an error that says what to do."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return tuple(backward_op(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "Gated KalmaNet's chunk-wise backward has no derivative of its own. "
            'Use backend="reference" for second derivatives.'
        )


class GKAFunction(torch.autograd.Function):
    """The operators as one differentiable function; torch.func transforms pass through it.

    Inputs and outputs are those of gka::forward.
    """

    generate_vmap_rule = True

    # Arguments are spelt out: without gradients Dynamo counts them to see whether a context comes first.
    @staticmethod
    def forward(
        q, k, v, g, gk, alpha, beta, h0, u0, cu_seqlens, cu_seqlens_cpu,
        scale, ridge_ratio, num_iter, chunk_size, tied, with_h, solver, keep_states, mode, backend,
    ):  # fmt: skip
        return forward_op(
            q, k, v, g, gk, alpha, beta, h0, u0, cu_seqlens, cu_seqlens_cpu,
            scale, ridge_ratio, num_iter, chunk_size, tied, with_h, solver, keep_states, mode, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *numbers, _mode, backend = inputs[_NUM_TENSORS:]
        _, x, x_scale, h, _, kept = output
        ctx.mark_non_differentiable(x, x_scale, kept)
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], x, x_scale, kept)
        ctx.numbers = (*numbers, backend)
        ctx.has_h = h.numel() > 0
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        do, _, _, dh, du, _ = grads
        *tensors, x, x_scale, kept = ctx.saved_tensors
        q, v = tensors[0], tensors[2]
        if do is None:
            do = q.new_zeros(*q.shape[:3], v.shape[-1])
        dh = dh if ctx.has_h else None
        # Compiled graphs never differentiate a backward, and Dynamo cannot trace a Function inside another.
        derive = backward_op if torch.compiler.is_compiling() else GKABackward.apply
        grads = derive(*tensors, x, x_scale, kept, do.contiguous(), dh, du, *ctx.numbers)
        given = tensors[: len(grads)]
        wanted = (None if t is None else grad for grad, t in zip(grads, given, strict=True))
        bounds = (None, None)
        return *wanted, *bounds, *(None for _ in range(len(ctx.numbers) + 1))


class GKAEager(torch.autograd.Function):
    """`GKAFunction` where autograd alone observes operators (`is_eager`).

    It skips the dispatcher, which takes the host longer than the launches. It saves the same tensors as
    `GKAFunction`, because checkpointing counts them.
    """

    @staticmethod
    def forward(ctx, settings, mode, backend, *tensors):
        o, x, x_scale, h, u, kept = _forward(Tokens(*tensors), settings, mode, backend)
        ctx.save_for_backward(*tensors, x, x_scale, kept)
        ctx.settings, ctx.backend, ctx.has_h = settings, backend, h.numel() > 0
        ctx.set_materialize_grads(False)
        return o, h, u

    @staticmethod
    def backward(ctx, *grads):
        do, dh, du = grads
        *tensors, x, x_scale, kept = ctx.saved_tensors
        tokens, settings = Tokens(*tensors), ctx.settings
        if do is None:
            do = tokens.q.new_zeros(*tokens.q.shape[:3], tokens.v.shape[-1])
        do, dh = do.contiguous(), dh if ctx.has_h else None
        if torch.is_grad_enabled():  # create_graph: differentiating the result raises our error
            found = GKABackward.apply(
                *tensors,
                x,
                x_scale,
                kept,
                do,
                dh,
                du,
                *pack(tokens, settings)[_NUM_TENSORS:],
                ctx.backend,
            )
        else:
            found = _backward(tokens, settings, (x, x_scale, kept), do, dh, du, ctx.backend)
        wanted = (None if t is None else grad for grad, t in zip(found, tensors, strict=False))
        return None, None, None, *wanted, None, None


keep_signature(GKAFunction, GKABackward)
