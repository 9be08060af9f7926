"""The states before a call's tokens: given for every sequence or the first, or carried from other ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gka.ops import checks
from gka.ops.context import SequenceContext, carried_states
from gka.ops.dispatch import autocast

State = tuple[Tensor, Tensor]


@torch.compiler.disable(reason="ranks exchange states: a graph cannot hold the collectives")
def states_before(
    context: SequenceContext, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Any, ...],
    initial_state: State | Tensor | None, wanted: bool, with_h: bool,
) -> State | Tensor:  # fmt: skip
    """The states before this rank's tokens. Checks the inputs that the exchange reads.

    Args:
        gates: g, gk, alpha, beta. wanted: whether H is needed. with_h: whether states are pairs.
    """
    g, gk, alpha, beta = gates
    checks.check_tensors(q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    checks.check_inputs(q, k, v, g=g, gk=gk, alpha=alpha, beta=beta)
    sequences = len(context.documents) or len(q)
    if isinstance(initial_state, tuple | list) and len(initial_state) == 2:
        sequences = len(initial_state[0])
    elif isinstance(initial_state, Tensor):
        sequences = len(initial_state)
    if initial_state is not None:
        check_initial_state(initial_state, sequences, q, v, with_h)
    heads, initial = q.shape[2], states_of(initial_state)
    h0, u0 = carried_states(context, k, v, g, gk, beta, heads, initial, wanted)
    if not with_h:
        return u0
    return u0.new_zeros(len(u0), heads, *2 * q.shape[3:]) if h0 is None else h0, u0


def states_of(
    initial_state: State | Tensor | None, packed: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """h0 and u0 of an initial state that `check_initial_state` accepts.

    Args:
        packed: the number of packed sequences; those after a state of the first one start from zero.
    """
    if isinstance(initial_state, Tensor) or initial_state is None:
        h0, u0 = None, initial_state
    else:
        h0, u0 = initial_state
    return _for_all(h0, packed), _for_all(u0, packed)


def _for_all(state: Tensor | None, packed: int | None) -> Tensor | None:
    if state is None or packed is None or len(state) == packed:
        return state
    return pad(state, (0, 0, 0, 0, 0, 0, 0, packed - len(state)))


def first_of_packed(state: Any, cu_seqlens: Tensor | None, sequences: int) -> int:
    """States that an initial state holds: one for each sequence, or that of the first packed one alone."""
    first = state[-1] if isinstance(state, tuple | list) and state else state
    alone = cu_seqlens is not None and isinstance(first, Tensor) and first.dim() and len(first) == 1
    return 1 if alone else sequences


def check_initial_state(
    state: State | Tensor, sequences: int, q: Tensor, v: Tensor, with_h: bool
) -> None:
    heads, key_dim = q.shape[2:]
    u_shape = (sequences, heads, key_dim, v.shape[-1])
    if not with_h:
        checks.check_tensor("initial_state", state)
        assert isinstance(state, Tensor)
        checks.check_state("initial_state", state, u_shape, q)
        return
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"initial_state must be a pair (h_kk, h_kv); got {type(state).__name__}.")
    h0, u0 = state
    checks.check_state("initial_state[0] (h_kk)", h0, (sequences, heads, key_dim, key_dim), q)
    checks.check_state("initial_state[1] (h_kv)", u0, u_shape, q)
