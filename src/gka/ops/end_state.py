"""The state that a text adds, read from an empty state: what it hands to the text after it."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gka.errors import InputError
from gka.maths.chunked import ScannedStates, Settings, Tokens
from gka.maths.ends import EndInputs, Part
from gka.ops import checks
from gka.ops.backends import Call, get_backend, resolve_backend
from gka.ops.dispatch import inside, no_autocast
from gka.ops.surround import why_unfused

SECOND = "end_state has no second derivative: its gradients are formed in one pass."
_GIVEN = ("k", "v", "g", "gk", "beta")


class Totals(NamedTuple):
    """Total log decays of U and of H over each sequence [N,H]; None where there is no decay."""

    g: Tensor | None
    gk: Tensor | None


class EndState(NamedTuple):
    """What a text adds: after state S it leaves exp(total) S + this (`combine_states`).

    Attributes:
        totals: log decays [N,H], float32 (float64 for float64 inputs).
        h_kk: [N,H,K,K]. h_kv: [N,H,K,V].
        starts: H and U at the start of every chunk [M,H,K,K] and [M,H,K,V], sequence after sequence, from an
            empty state; without gradient. None unless wanted.
    """

    totals: Totals
    h_kk: Tensor
    h_kv: Tensor
    starts: tuple[Tensor, Tensor] | None


class EndMoment(torch.autograd.Function):
    """One moment at the ends of sequences, from zero, and its total log decay in float64.

    Only the inputs are kept. The backward pass is two products per token (`maths.ends`), without a scan.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor | None,
        g: Tensor | None,
        beta: Tensor | None,
        cu_seqlens: Tensor | None,
        cu_seqlens_cpu: Tensor | None,
        heads: int,
        known: tuple[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v, g, beta, cu_seqlens, cu_seqlens_cpu)
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        with inside("gka.end_state", k.device.type):
            part = Part(k, v, g, beta, heads, cu_seqlens, cu_seqlens_cpu)
            return part.total, part.moment() if known is None else known[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_total, grad = grads
        found = _EndGradients.apply(*ctx.saved_tensors, grad, grad_total, ctx.heads)
        wanted = (
            dx if needed else None for dx, needed in zip(found, ctx.needs_input_grad, strict=False)
        )
        return *wanted, None, None, None, None


class _EndGradients(torch.autograd.Function):
    """Gradients of k, v, g and beta; their own derivative raises an error."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        *inputs, cu_seqlens, cu_seqlens_cpu, grad, grad_total, heads = given
        k, v, g, beta = inputs
        with inside("gka.end_state_backward", k.device.type):
            part = Part(k, v, g, beta, heads, cu_seqlens, cu_seqlens_cpu)
            if grad is None:
                shape = (part.layout.num_sequences, heads, k.shape[-1], part.v.shape[-1])
                grad = torch.zeros(shape, dtype=part.work, device=k.device)
            found = part.gradients(grad, grad_total)
        grads = (found.k, found.v, found.g, found.beta)
        return tuple(
            None if x is None or given is None else x.to(given.dtype)
            for x, given in zip(grads, inputs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(SECOND)


def end_moment(
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    beta: Tensor | None,
    heads: int,
    bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    known: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Total log decays [N,H] (None without g) and the moment [N,H,K,V] of checked inputs, differentiable.

    Args:
        v: None for H.
        bounds: cu_seqlens and its copy on the CPU.
        known: the moment, if a backend's scan has summed it.
    """
    held = None if known is None else (known,)
    total, end = EndMoment.apply(k, v, g, beta, *bounds, heads, held)
    return None if g is None else total.to(end.dtype), end


class EndStates(torch.autograd.Function):
    """Both moments by the Triton kernels, which read keys and values once for all of a chunk's gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: EndInputs, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Total log decays of U and H, U and H. tensors: k, v, g, gk and beta once more, for autograd."""
        from gka.kernels.ends import end_states

        with inside("gka.end_state", inputs.k.device.type):
            found = end_states(inputs)
        ctx.save_for_backward(*tensors, inputs.cu_seqlens, found.after_u, found.after_h)
        ctx.inputs = replace(inputs, **dict.fromkeys((*_GIVEN, "cu_seqlens")))
        ctx.set_materialize_grads(False)
        totals_h = None if inputs.tied else found.totals_h
        return found.totals_u, totals_h, found.u, found.h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = _EndStatesGradients.apply(ctx.inputs, *ctx.saved_tensors, *grads)
        return None, *found


class _EndStatesGradients(torch.autograd.Function):
    """Gradients of k, v, g, gk and beta; their own derivative raises an error."""

    @staticmethod
    def forward(ctx: Any, inputs: EndInputs, *given: Any) -> tuple[Tensor | None, ...]:
        from gka.kernels.ends import end_states_backward

        tensors = dict(zip((*_GIVEN, "cu_seqlens"), given[:6], strict=True))
        after_u, after_h, total_u, total_h, of_u, of_h = given[6:]
        inputs = replace(inputs, **tensors)
        k, key_dim, value_dim = inputs.k, inputs.k.shape[-1], inputs.v.shape[-1]
        count = len(k) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
        zeros = partial(torch.zeros, dtype=torch.float32, device=k.device)
        of_u = zeros(count, inputs.heads, key_dim, value_dim) if of_u is None else of_u
        if inputs.with_h and of_h is None:
            of_h = zeros(count, inputs.heads, key_dim, key_dim)
        with inside("gka.end_state_backward", k.device.type):
            grads = end_states_backward(
                inputs, (after_u, after_h), (of_u, of_h), (total_u, total_h)
            )
        return tuple(
            None if dx is None else dx.to(x.dtype)
            for dx, x in ((getattr(grads, n), tensors[n]) for n in _GIVEN)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(SECOND)


@torch.compiler.disable(reason="the kernels are launched from Python")
def _by_kernels(inputs: EndInputs) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    tensors = [getattr(inputs, name) for name in _GIVEN]
    *totals, u, h = EndStates.apply(inputs, *tensors)
    total_u, total_h = (None if x is None else x.to(u.dtype) for x in totals)
    return total_u, total_h, u, h


def _by_torch(inputs: EndInputs) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    of = inputs.heads, (inputs.cu_seqlens, inputs.cu_seqlens_cpu)
    total_u, u = end_moment(inputs.k, inputs.v, inputs.g, inputs.beta, *of)
    total_h = h = None
    if inputs.with_h:
        gk = inputs.g if inputs.tied else inputs.gk
        total_h, h = end_moment(inputs.k, None, gk, inputs.beta, *of)
    return total_u, total_h, u, h


def end_moments(inputs: EndInputs) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Total log decays of U and of H [N,H] (None without decay), and U and H (None unless wanted) of checked
    inputs, differentiable: by kernels where they can run, else by torch.

    Where g decays both states, both totals are one tensor.
    """
    if why_not_kernels(inputs) is None:
        total_u, total_h, u, h = _by_kernels(inputs.contiguous())
    else:
        total_u, total_h, u, h = _by_torch(inputs)
    return total_u, total_u if inputs.tied else total_h, u, h


def why_not_kernels(inputs: EndInputs) -> str | None:
    """Why torch computes end states of these inputs; None if the kernels do."""
    if inputs.k.device.type != "cuda":
        return "the kernels run on a GPU."
    return why_unfused(inputs.k.device, inputs.k.dtype, (inputs.k.shape[-1], inputs.v.shape[-1]))


def end_state(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    num_heads: int | None = None,
    return_starts: bool = False,
    chunk_size: int = 64,
    backend: str = "auto",
    cu_seqlens_cpu: Tensor | None = None,
) -> EndState:
    """The states after each sequence, read from empty states, and its total log decays.

    H = sum_j exp(gk_{j+1} + ... + gk_T) beta_j^2 k_j k_j^T,  U likewise with g and k_j v_j^T. States that
    were there before fade and add up: `combine_states(before, (h_kk, h_kv), totals.g, totals.gk)`.
    Differentiable once, in k, v, g, gk and beta, from totals, h_kk and h_kv.

    Args:
        k, v, g, gk, beta, cu_seqlens, cu_seqlens_cpu: as in `chunk_gka`. Pass g itself as gk to tie the two.
        num_heads: heads H. None: those of the gates, or without gates the larger count of k and v.
        return_starts: also return H and U at the start of every chunk. A pass that starts from states S has
            exp(log decay up to the chunk) S + these at its chunk starts.
        chunk_size: tokens of these chunks, 1..4096.
        backend: whose scan sums the states, as in `chunk_gka` ("reference" has none). "auto": one weighted
            product over all tokens, which needs no scan; with return_starts the first backend that can run.

    Returns:
        An `EndState`, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: a shape, range or dtype is wrong; the message names the argument.
        RuntimeError: the named backend cannot run these inputs.
    """
    checks.check_tensors(k=k, v=v)
    checks.check_flags(return_starts=return_starts)
    heads = _count_heads(k, v, (g, gk, beta), num_heads)
    like = k if k.shape[2] == heads else k.new_empty(*k.shape[:2], heads, k.shape[3])
    checks.check_inputs(like, k, v, g=g, gk=gk, beta=beta)
    checks.check_numbers(1.0, 1, chunk_size)
    checks.check_lengths(like, cu_seqlens, cu_seqlens_cpu)
    bounds = (cu_seqlens, cu_seqlens_cpu)
    if cu_seqlens is not None:
        read = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
        checks.check_bounds(read, k.shape[1])
    starts, known = None, (None, None)
    if return_starts or backend != "auto":
        found = _scan(backend, like, (k, v, g, gk, beta), bounds, chunk_size)
        starts = (found.h_start, found.u_start) if return_starts else None
        known = (found.h, found.u)
    if known[0] is None:
        tied = g is not None and g is gk
        given = EndInputs(k, v, g, gk, beta, heads, tied, True, *bounds)
        g_total, gk_total, u, h = end_moments(given)
        assert h is not None
    else:
        gk_total, h = end_moment(k, None, gk, beta, heads, bounds, known[0])
        g_total, u = end_moment(k, v, g, beta, heads, bounds, known[1])
    return EndState(Totals(g_total, gk_total), h, u, starts)


def _count_heads(k: Tensor, v: Tensor, gates: tuple[Any, ...], num_heads: int | None) -> int:
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, T, heads, dim]; got {list(x.shape)}."
            )
    known = [x.shape[2] for x in gates if isinstance(x, Tensor) and x.dim() == 3]
    heads = (known[0] if known else max(k.shape[2], v.shape[2])) if num_heads is None else num_heads
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"num_heads must be a positive int; got {heads!r}.")
    return heads


@torch.no_grad()
def _scan(
    name: str, q: Tensor, inputs: tuple[Any, ...], bounds: tuple[Any, Any], chunk_size: int
) -> ScannedStates:
    """H and U at chunk starts and ends by a backend's scan."""
    k, v, g, gk, beta = inputs
    if name == "reference":
        raise InputError('backend="reference" goes token by token and has no scan: use "torch".')
    call = Call(k.device, k.dtype, "chebyshev", (k.shape[3], v.shape[3]), chunk_size)
    backend = get_backend(resolve_backend(name, call))
    tied = g is not None and g is gk
    tokens = Tokens(q, k, v, g, None if tied else gk, None, beta, None, None, *bounds)
    settings = Settings(1.0, 1.0, 1, chunk_size, tied, True)
    with no_autocast(k.device.type):
        return backend.states(tokens, settings)
