"""Validation of states that are updated in place: before anything is written."""

import torch
from torch import Tensor

from gka.ops.checks import check_tensor

INTEGERS = (torch.int64, torch.int32)


def heads_of(state: object) -> int:
    """H of a pair of states."""
    _, u = _pair(state)
    check_tensor("state[1] (h_kv)", u)
    if u.dim() != 4:
        raise ValueError(f"state[1] (h_kv) must be [P, H, K, V]; got {list(u.shape)}.")
    return u.shape[1]


def _pair(state: object) -> tuple:
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state must be a pair (h_kk, h_kv); got {type(state).__name__}.")
    return state[0], state[1]


def check_pool(
    state: object, indices: Tensor | None, q: Tensor, v: Tensor, solves: bool
) -> tuple[Tensor | None, Tensor]:
    """h_kk [P,H,K,K] and h_kv [P,H,K,V] fit q, v and each other; indices [B], or P = B."""
    h, u = _pair(state)
    check_tensor("state[1] (h_kv)", u)
    places = u.shape[0] if u.dim() else 0
    batch, _, heads, dim = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    halves = () if work == torch.float64 else (torch.bfloat16,)
    _check_states("state[1] (h_kv)", u, (places, heads, dim, v.shape[-1]), (work, *halves), q)
    if h is not None:
        check_tensor("state[0] (h_kk)", h)
        _check_states("state[0] (h_kk)", h, (places, heads, dim, dim), (work,), q)
        if h is u:
            raise ValueError(
                "state[0] (h_kk) and state[1] (h_kv) must be two tensors; got one twice."
            )
    elif solves:
        raise ValueError("state[0] (h_kk) may be None only with num_iter = 0.")
    if indices is not None:
        check_integers("state_indices", indices, q)
    elif places != batch:
        raise ValueError(
            f"state must hold one state for each of q's {batch} sequences; got {places}. "
            "Pass state_indices to use a pool."
        )
    return h, u


def _check_states(
    name: str, state: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], q: Tensor
) -> None:
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(state.shape)}.")
    if state.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{name} must be {wanted} for {q.dtype} inputs; got {state.dtype}.")
    if state.device != q.device:
        raise TypeError(f"{name} must be on {q.device}; got {state.device}.")
    if state.requires_grad:
        raise ValueError(f"{name} is updated in place and must not require grad: detach it.")
    if shape[0] and not state[0].is_contiguous():
        raise ValueError(f"{name}: each state must be contiguous; got strides {state.stride()}.")
    if shape[0] > 1 and state.stride(0) < state[0].numel():
        raise ValueError(f"{name}: states must not overlap; got strides {state.stride()}.")
    # matrices of other sizes are never read 16 bytes at a time
    wide = shape[-2] * shape[-1] * state.element_size() % 16 == 0
    if wide and state.device.type == "cuda" and not torch.compiler.is_compiling():
        step = state.stride(0) * state.element_size() if shape[0] > 1 else 0
        if state.data_ptr() % 16 or step % 16:
            raise ValueError(f"{name}: each state must begin at a multiple of 16 bytes.")


def check_integers(name: str, x: Tensor, q: Tensor) -> None:
    """One integer a sequence, on q's device."""
    check_tensor(name, x)
    if tuple(x.shape) != (q.shape[0],):
        raise ValueError(f"{name} must have shape [B] = [{q.shape[0]}]; got {list(x.shape)}.")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int64 or int32; got {x.dtype}.")
    if x.device != q.device:
        raise TypeError(f"{name} must be on {q.device}; got {x.device}.")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous.")


def check_places(indices: Tensor, places: int) -> None:
    """Reads the values: each place in the pool, and none twice."""
    if torch.compiler.is_compiling():
        return
    found = indices.tolist()
    if any(not -1 <= place < places for place in found):
        raise ValueError(f"state_indices must be in -1..{places - 1}; got {found}.")
    taken = [place for place in found if place >= 0]
    if len(set(taken)) < len(taken):
        raise ValueError(f"state_indices must name each place at most once; got {found}.")
