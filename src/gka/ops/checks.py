"""Validation at the public boundary, once: all code below relies on it. States that are updated in place are
checked before anything is written."""

import itertools
import math
from typing import get_args

import torch
from torch import Tensor

from gka.maths.solvers import SolverName

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_KEY_NORM = 4e9  # its fourth power is about float32's largest number
FLOAT32_MAX = torch.finfo(torch.float32).max
# A chunk holds C x C decays per head, which exceed any memory for larger C.
MAX_CHUNK_SIZE = 4096
# A call with more steps only seems to hang: 10,000 solve to 1e-8 at ridge_ratio = 1e-6.
MAX_NUM_ITER = 10_000
# For F_t from 1e-16 to 1e19, a F_t and its reciprocal stay in float32's range.
RIDGE_RATIOS = (1e-9, 1e9)


def _shape(x: Tensor) -> str:
    return f"{list(x.shape)}"


# Checks are plain branches that format a message only to raise it: formatting would make torch.compile
# treat the lengths and numbers in it as constants, and compile again for every other length.


def check_tensor(name: str, x: object) -> None:
    """The argument is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}.")
    if x.layout != torch.strided or x.is_nested or x.is_mkldnn:
        raise TypeError(f"{name} must be a dense tensor; got a {_kind(x)} one.")


def check_tensors(**named: object) -> None:
    """Each named argument is a tensor."""
    for name, x in named.items():
        check_tensor(name, x)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, **gates: Tensor | None) -> None:
    """q, k, v and gates fit together."""
    check_heads(q, k, v)
    check_gates(q, **gates)


def check_settings(
    ridge_ratio: float,
    num_iter: int,
    chunk_size: int,
    scale: float | None,
    output_final_state: bool,
) -> None:
    """The numbers and flags of a call."""
    check_numbers(ridge_ratio, num_iter, chunk_size, scale)
    check_flags(output_final_state=output_final_state)


def check_lengths(q: Tensor, cu_seqlens: Tensor | None, copy: Tensor | None) -> int:
    """Check the bounds and their CPU copy against q and each other. Returns the number of sequences."""
    sequences = check_cu_seqlens(q, cu_seqlens)
    check_cu_seqlens_cpu(cu_seqlens, copy)
    return sequences


def _kind(x: Tensor) -> str:
    """The layout of a tensor that is not dense: sparse_coo, nested, mkldnn, ..."""
    if x.is_nested:
        return "nested"
    return "mkldnn" if x.is_mkldnn else str(x.layout).removeprefix("torch.")


def check_flags(**flags: object) -> None:
    """Each named option is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False; got {flag!r:.60}.")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of q [B,T,H,K], k [B,T,Hk,K], v [B,T,Hv,V]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, T, heads, dim]; got {_shape(x)}.")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {x.dtype}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{name} must have q's dtype and device ({q.dtype}, {q.device}); "
                f"got {x.dtype}, {x.device}."
            )
        _check_sizes(name, x, q)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head dimension {q.shape[3]}; got {_shape(k)}.")


def _check_sizes(name: str, x: Tensor, q: Tensor) -> None:
    if x.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{name} must have q's batch and length [{q.shape[0]}, {q.shape[1]}, ...]; "
            f"got {_shape(x)}."
        )
    heads = x.shape[2]
    if heads == 0 or q.shape[2] % heads != 0:
        raise ValueError(f"q's {q.shape[2]} heads must be a multiple of {name}'s; got {heads}.")
    if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name}'s head dimension must be between 1 and {MAX_HEAD_DIM}; got {x.shape[3]}."
        )


def check_gates(q: Tensor, **gates: Tensor | None) -> None:
    """Gates are [B,T,H] of a float dtype on q's device."""
    for name, gate in gates.items():
        if gate is None:
            continue
        check_tensor(name, gate)
        if gate.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must have shape [B, T, H] = {list(q.shape[:3])}; got {_shape(gate)}."
            )
        if gate.dtype not in DTYPES:
            raise TypeError(f"{name} must be a floating-point tensor; got {gate.dtype}.")
        if gate.device != q.device:
            raise TypeError(f"{name} must be on {q.device}; got {gate.device}.")


def check_numbers(
    ridge_ratio: float, num_iter: int, chunk_size: int, scale: float | None = None
) -> None:
    """Types and ranges of the map's parameters."""
    for name, number in (("num_iter", num_iter), ("chunk_size", chunk_size)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int; got {number!r}.")
    if not isinstance(ridge_ratio, int | float) or isinstance(ridge_ratio, bool):
        raise TypeError(f"ridge_ratio must be a number; got {ridge_ratio!r}.")
    if num_iter < 0:
        raise ValueError(f"num_iter must be >= 0 (0 leaves the ridge out); got {num_iter}.")
    if num_iter > MAX_NUM_ITER:
        raise ValueError(f"num_iter must be at most {MAX_NUM_ITER}; got {num_iter}.")
    if not 0 < ridge_ratio < math.inf:
        raise ValueError(f"ridge_ratio must be > 0 and finite; got {ridge_ratio}.")
    if not RIDGE_RATIOS[0] <= ridge_ratio <= RIDGE_RATIOS[1]:
        raise ValueError(
            f"ridge_ratio must be between {RIDGE_RATIOS[0]:g} and {RIDGE_RATIOS[1]:g}; got {ridge_ratio}."
        )
    check_scale(scale)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1; got {chunk_size}.")
    if chunk_size > MAX_CHUNK_SIZE:
        raise ValueError(f"chunk_size must be at most {MAX_CHUNK_SIZE}; got {chunk_size}.")


def check_scale(scale: float | None) -> None:
    """The readout's factor is None or a finite float32 number."""
    if scale is None:
        return
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number; got {scale!r}.")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite; got {scale}.")
    if abs(scale) > FLOAT32_MAX:
        raise ValueError(f"scale must be in float32's range; got {scale}.")


def check_solver(solver: str) -> SolverName:
    """The solver's name, checked."""
    for known in get_args(SolverName):
        if solver == known:
            return known
    raise ValueError(f"solver must be one of {', '.join(get_args(SolverName))}; got {solver!r}.")


def check_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """cu_seqlens [N+1] has the right shape and dtype, and B = 1. Returns the number of sequences."""
    if cu_seqlens is None:
        return q.shape[0]
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.device != q.device:
        raise TypeError(f"cu_seqlens must be on {q.device}; got {cu_seqlens.device}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be one-dimensional with at least 2 entries; got {_shape(cu_seqlens)}."
        )
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens must be int64 or int32; got {cu_seqlens.dtype}.")
    if q.shape[0] != 1:
        raise ValueError(
            f"packed sequences (cu_seqlens) come with B = 1; got B = {q.shape[0]}. "
            "Concatenate them along T."
        )
    return cu_seqlens.numel() - 1


def check_cu_seqlens_cpu(cu_seqlens: Tensor | None, copy: Tensor | None) -> None:
    """The CPU copy of cu_seqlens has its length and lies on the CPU; `check_bounds` reads its values."""
    if copy is None:
        return
    if cu_seqlens is None:
        raise ValueError("cu_seqlens_cpu is the CPU copy of cu_seqlens: pass cu_seqlens too.")
    check_tensor("cu_seqlens_cpu", copy)
    if copy.device.type != "cpu":
        raise TypeError(f"cu_seqlens_cpu must be on the CPU; got {copy.device}.")
    if copy.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_cpu must have cu_seqlens' shape {_shape(cu_seqlens)}; got {_shape(copy)}."
        )
    if copy.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens_cpu must be int64 or int32; got {copy.dtype}.")


def check_same_bounds(cu_seqlens: Tensor | None, copy: Tensor | None) -> None:
    """The copy equals cu_seqlens. A debug check (GKA_DEBUG=1), since it reads the device."""
    if cu_seqlens is not None and copy is not None and cu_seqlens.tolist() != copy.tolist():
        raise ValueError(
            f"cu_seqlens_cpu must equal cu_seqlens {cu_seqlens.tolist()}; got {copy.tolist()}."
        )


def check_bounds(cu_seqlens: Tensor, length: int) -> None:
    """The values of cu_seqlens rise from 0 to T. Runs where they are read anyway."""
    if cu_seqlens.device.type == "meta":
        raise ValueError("cu_seqlens has no values on the meta device: pass cu_seqlens_cpu too.")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"cu_seqlens must start with 0 and end with T = {length}; "
            f"got {bounds[0]} .. {bounds[-1]}."
        )
    if any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must not decrease; got {bounds}.")


def check_state(name: str, state: Tensor, expected: tuple[int, ...], q: Tensor) -> None:
    """A state has the expected shape, the working dtype and q's device."""
    check_tensor(name, state)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if tuple(state.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)}; got {_shape(state)}.")
    if state.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for {q.dtype} inputs; got {state.dtype}.")
    if state.device != q.device:
        raise TypeError(f"{name} must be on {q.device}; got {state.device}.")


def check_key_norms(k: Tensor, backend: str) -> None:
    """Debug check (GKA_DEBUG=1): F_t^2, of size |k|^4, is in float32's range. Not for "torch", which scales.

    Raises:
        ValueError: keys that are too large for the backend.
    """
    if backend == "torch" or k.dtype == torch.float64 or k.numel() == 0:
        return
    largest = torch.linalg.vector_norm(k.double(), dim=-1).max().item()
    if largest > MAX_KEY_NORM:
        raise ValueError(
            f"k holds a key of norm {largest:.1e}: with backend={backend!r} |H|^2 overflows float32 above "
            f'{MAX_KEY_NORM:.0e}. Scale the keys, or use backend="torch".'
        )


def check_values(**named: Tensor | None) -> None:
    """Debug check of values (GKA_DEBUG=1): everything finite, log decays not positive, H symmetric.

    Raises:
        ValueError: the message names the tensor and the values found.
    """
    for name, x in named.items():
        if x is None:
            continue
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds NaN or infinity.")
        worst = x.max().item() if x.numel() else 0.0
        if name in ("g", "gk") and worst > 0:
            raise ValueError(
                f"{name} is a log decay and must be <= 0; its largest value is {worst}."
            )
        if name == "h_kk" and (x - x.mT).norm() > 1e-3 * x.norm():
            raise ValueError(f"{name} must be symmetric: it is a sum of k k^T.")


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
    # only such matrices are read 16 bytes at a time
    wide = shape[-2] * shape[-1] * state.element_size() % 16 == 0
    if wide and state.device.type == "cuda" and not torch.compiler.is_compiling():
        step = state.stride(0) * state.element_size() if shape[0] > 1 else 0
        if state.data_ptr() % 16 or step % 16:
            raise ValueError(f"{name}: each state must begin at a multiple of 16 bytes.")


def check_integers(name: str, x: Tensor, q: Tensor) -> None:
    """x holds one integer per sequence, on q's device."""
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
    """Each place is in the pool, and none occurs twice. Reads the values."""
    if torch.compiler.is_compiling():
        return
    found = indices.tolist()
    if any(not -1 <= place < places for place in found):
        raise ValueError(f"state_indices must be in -1..{places - 1}; got {found}.")
    taken = [place for place in found if place >= 0]
    if len(set(taken)) < len(taken):
        raise ValueError(f"state_indices must name each place at most once; got {found}.")
