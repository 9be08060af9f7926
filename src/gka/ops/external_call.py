"""A checked call of a baseline's memory, run by the kernels of an installed library (`gka.ops.external`).

Inputs that the libraries do not accept are converted: shared heads are repeated, empty sequences removed, and
a call without tokens never reaches them. torch.compile sees flash-qla's kernels as an operator. It breaks its
graph at flash-linear-attention's functions, which their authors exclude from compilation.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gka.ops import checks, flash_qla
from gka.ops.autograd import keep_signature, no_autocast
from gka.ops.backends import current, note_backend
from gka.ops.external import EXTERNAL, Given, Rule

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
    if name == "flash_qla" and torch.compiler.is_compiling() and whole.q.numel() > 0:
        return flash_qla.compiled(whole, cu_seqlens_cpu)
    return _uncompiled(name, rule, whole, cu_seqlens_cpu)


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
        # an empty sequence ends as it began
        before = _zeros(x) if x.state is None else x.state
        state = before.index_copy(0, places, state)
    return o, state


_uncompiled: Any = torch.compiler.disable(_run)


def filled(bounds: Tensor) -> Tensor | None:
    """Indices of the sequences that hold tokens, on the CPU; None if all do."""
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
            raise RuntimeError(
                "the kernels of installed libraries have no second derivative. "
                'Use backend="torch" for it.'
            )
        return grads


keep_signature(Once)
