"""Combine the states of separately read texts into one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gka.maths.moments import after
from gka.ops.checks import DTYPES, check_tensor

State = tuple[Tensor, Tensor]


def combine_states(a: State, b: State, g: Tensor | None, gk: Tensor | None = None) -> State:
    """The state after text A and then text B, from the states of A and B, each read from an empty state.

    H = exp(gk) H_A + H_B,  U = exp(g) U_A + U_B. Exact if B's keys, values and gates are the same after A
    as alone; in a model with more than one layer they differ slightly (docs/howto/serve.md).
    Differentiable.

    Args:
        a, b: (h_kk [N,H,K,K], h_kv [N,H,K,V]), as `chunk_gka` returns them.
        g: total log decay of U over B, `chunk_gka`'s g summed over B's tokens [N,H]. None: no decay.
        gk: the same for H. Pass g itself if one decay serves both. None: H does not decay.

    Returns:
        (h_kk, h_kv).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    _check_states([a, b])
    for name, total in (("g", g), ("gk", gk)):
        if total is None:
            continue
        check_tensor(name, total)
        if total.shape != a[0].shape[:2]:
            raise ValueError(
                f"{name} must be a total log decay [N, H] = {list(a[0].shape[:2])}, "
                f"summed over the later text's tokens; got {list(total.shape)}."
            )
        if total.dtype not in DTYPES:
            raise TypeError(f"{name} must be a floating-point tensor; got {total.dtype}.")
        if total.device != a[0].device:
            raise TypeError(f"{name} must be on {a[0].device}; got {total.device}.")
    return after(a[0], b[0], gk), after(a[1], b[1], g)


def sum_states(states: Sequence[State]) -> State:
    """The sum of states, in which no text fades another.

    Raises:
        ValueError, TypeError: none given, or shapes, dtypes or devices that do not fit.
    """
    _check_states(states)
    h, u = (torch.stack([state[i] for state in states]).sum(0) for i in (0, 1))
    return h, u


def mean_states(states: Sequence[State]) -> State:
    """The mean of states: `sum_states` divided by their number.

    The ridge's readout U^T (H + a |H| I)^-1 q is the same for sum and mean, as H and U scale together. They
    differ in the alpha-connection's share of U^T q, and in the weight of tokens read afterwards.

    Raises:
        ValueError, TypeError: none given, or shapes, dtypes or devices that do not fit.
    """
    h, u = sum_states(states)
    return h / len(states), u / len(states)


def _check_states(states: Sequence[State]) -> None:
    if not isinstance(states, Sequence):
        raise TypeError(f"states must be a list of pairs; got {type(states).__name__}.")
    if len(states) == 0:
        raise ValueError("states must hold at least one pair (h_kk, h_kv); got none.")
    for number, state in enumerate(states):
        if not isinstance(state, tuple | list) or len(state) != 2:
            raise TypeError(
                f"state {number} must be a pair (h_kk, h_kv); got {type(state).__name__}."
            )
        for name, x, first in zip(("h_kk", "h_kv"), state, states[0], strict=True):
            check_tensor(f"{name} of state {number}", x)
            if x.dtype not in DTYPES:
                raise TypeError(f"{name} of state {number} must be floating-point; got {x.dtype}.")
            if x.dim() != 4 or x.shape != first.shape:
                raise ValueError(
                    f"{name} must have one shape [N, H, K, dim] in all states; got {list(first.shape)} "
                    f"in state 0 and {list(x.shape)} in state {number}."
                )
            if x.dtype != first.dtype or x.device != first.device:
                raise TypeError(
                    f"{name} must have one dtype and device in all states; got {first.dtype}, "
                    f"{first.device} in state 0 and {x.dtype}, {x.device} in state {number}."
                )
    h, u = states[0]
    if h.shape[:3] != u.shape[:3] or h.shape[2] != h.shape[3]:
        raise ValueError(
            f"h_kk [N, H, K, K] and h_kv [N, H, K, V] of a state must fit; got {list(h.shape)} "
            f"and {list(u.shape)}."
        )
    if u.dtype != h.dtype or u.device != h.device:
        raise TypeError(
            f"h_kk and h_kv must have one dtype and device; got {h.dtype}, {h.device} and "
            f"{u.dtype}, {u.device}."
        )
