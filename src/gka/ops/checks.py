"""Validation at the public boundary, once: everything below may rely on it."""

import itertools
import math

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def _shape(x: Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def check_tensor(name: str, x: object) -> None:
    _require(
        isinstance(x, Tensor), f"{name} must be a torch.Tensor; got {type(x).__name__}.", TypeError
    )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of q [B,T,H,K], k [B,T,Hk,K], v [B,T,Hv,V]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        _require(
            x.dim() == 4, f"{name} must have 4 dimensions [B, T, heads, dim]; got {_shape(x)}."
        )
        _require(
            x.dtype in DTYPES,
            f"{name} must be float64, float32, bfloat16 or float16; got {x.dtype}.",
            TypeError,
        )
        _require(
            x.dtype == q.dtype and x.device == q.device,
            f"{name} must have q's dtype and device ({q.dtype}, {q.device}); "
            f"got {x.dtype}, {x.device}.",
            TypeError,
        )
        _require(
            x.shape[:2] == q.shape[:2],
            f"{name} must have q's batch and length [{q.shape[0]}, {q.shape[1]}, ...]; got {_shape(x)}.",
        )
        heads = x.shape[2]
        _require(
            heads > 0 and q.shape[2] % heads == 0,
            f"q's {q.shape[2]} heads must be a multiple of {name}'s; got {heads}.",
        )
        _require(
            1 <= x.shape[3] <= MAX_HEAD_DIM,
            f"{name}'s head dimension must be between 1 and {MAX_HEAD_DIM}; got {x.shape[3]}.",
        )
    _require(
        k.shape[3] == q.shape[3],
        f"k must have q's head dimension {q.shape[3]}; got {_shape(k)}.",
    )


def check_gates(q: Tensor, **gates: Tensor | None) -> None:
    """Gates are [B,T,H] of a float dtype on q's device."""
    for name, gate in gates.items():
        if gate is None:
            continue
        check_tensor(name, gate)
        expected = q.shape[:3]
        _require(
            gate.shape == expected,
            f"{name} must have shape [B, T, H] = [{', '.join(map(str, expected))}]; "
            f"got {_shape(gate)}.",
        )
        _require(
            gate.dtype in DTYPES,
            f"{name} must be a floating-point tensor; got {gate.dtype}.",
            TypeError,
        )
        _require(
            gate.device == q.device, f"{name} must be on {q.device}; got {gate.device}.", TypeError
        )


def check_numbers(
    ridge_ratio: float, num_iter: int, chunk_size: int, scale: float | None = None
) -> None:
    """Types and ranges of the map's parameters."""
    for name, number in (("num_iter", num_iter), ("chunk_size", chunk_size)):
        _require(
            isinstance(number, int) and not isinstance(number, bool),
            f"{name} must be an int; got {number!r}.",
            TypeError,
        )
    for name, value in (("ridge_ratio", ridge_ratio), ("scale", scale)):
        if value is not None or name == "ridge_ratio":
            _require(
                isinstance(value, int | float),
                f"{name} must be a number; got {value!r}.",
                TypeError,
            )
    _require(num_iter >= 0, f"num_iter must be >= 0 (0 leaves the ridge out); got {num_iter}.")
    _require(0 < ridge_ratio < math.inf, f"ridge_ratio must be > 0 and finite; got {ridge_ratio}.")
    _require(scale is None or -math.inf < scale < math.inf, f"scale must be finite; got {scale}.")
    _require(chunk_size >= 1, f"chunk_size must be >= 1; got {chunk_size}.")


def check_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """cu_seqlens [N+1] rises from 0 to T and comes with B = 1. Returns the number of sequences."""
    if cu_seqlens is None:
        return q.shape[0]
    check_tensor("cu_seqlens", cu_seqlens)
    _require(
        cu_seqlens.device == q.device,
        f"cu_seqlens must be on {q.device}; got {cu_seqlens.device}.",
        TypeError,
    )
    _require(
        cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2,
        f"cu_seqlens must be one-dimensional with at least 2 entries; got {_shape(cu_seqlens)}.",
    )
    _require(
        cu_seqlens.dtype in (torch.int64, torch.int32),
        f"cu_seqlens must be int64 or int32; got {cu_seqlens.dtype}.",
        TypeError,
    )
    _require(
        q.shape[0] == 1,
        f"packed sequences (cu_seqlens) come with B = 1; got B = {q.shape[0]}. "
        "Concatenate them along T.",
    )
    return cu_seqlens.numel() - 1


def check_bounds(cu_seqlens: Tensor, length: int) -> None:
    """Values of cu_seqlens: reads them, so it runs where they are read anyway."""
    bounds = cu_seqlens.tolist()
    _require(
        bounds[0] == 0 and bounds[-1] == length,
        f"cu_seqlens must start with 0 and end with T = {length}; got {bounds[0]} .. {bounds[-1]}.",
    )
    _require(
        all(a <= b for a, b in itertools.pairwise(bounds)),
        f"cu_seqlens must not decrease; got {bounds}.",
    )


def check_state(name: str, state: Tensor, expected: tuple[int, ...], q: Tensor) -> None:
    """A state has the expected shape, the working dtype and q's device."""
    check_tensor(name, state)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _require(
        tuple(state.shape) == expected,
        f"{name} must have shape [{', '.join(map(str, expected))}]; got {_shape(state)}.",
    )
    _require(
        state.dtype == dtype,
        f"{name} must be {dtype} for {q.dtype} inputs; got {state.dtype}.",
        TypeError,
    )
    _require(
        state.device == q.device, f"{name} must be on {q.device}; got {state.device}.", TypeError
    )


def check_values(**named: Tensor | None) -> None:
    """Debug check of values (GKA_DEBUG=1): everything finite, log decays not positive.

    Raises:
        ValueError: naming the tensor and what it holds.
    """
    for name, x in named.items():
        if x is None:
            continue
        _require(bool(torch.isfinite(x).all()), f"{name} holds NaN or infinity.")
        if name in ("g", "gk"):
            worst = x.max().item() if x.numel() else 0.0
            _require(
                worst <= 0, f"{name} is a log decay and must be <= 0; its largest value is {worst}."
            )
        if name == "h_kk":
            _require(
                torch.allclose(x, x.mT, rtol=1e-3, atol=1e-3 * float(x.abs().max())),
                f"{name} must be symmetric: it is a sum of k k^T.",
            )
