"""The kernels' arguments: ctypes structures that mirror those of chunk.cuh, scan.cuh and decode.cu."""

import ctypes
from typing import TypeVar

from torch import Tensor

_POINTERS = (
    "q", "k", "v", "g", "gk", "alpha", "beta", "h_start", "u_start", "h_scales", "h_norms",
    "u_scales", "chunk_start", "chunk_length", "o", "x", "x_scale", "steps", "d_o", "dq", "d_alpha",
    "y", "y_scale", "w", "key_weight", "start_weight", "start_u", "start_h",
    "u_ends", "h_ends", "u_end_scales", "u_wholes", "h_end_scales", "h_wholes", "k_maxima", "z_maxima",
    "v_maxima", "d_maxima", "dk", "dv", "dg", "dgk", "d_beta2",
)  # fmt: skip
_FLOATS = ("scale", "ridge_ratio", "empty_below", "stop")
_INTS = (
    "num_iter", "heads", "key_heads", "value_heads", "first_head", "group_heads", "first_chunk",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """`Arguments` of chunk.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_int) for name in _INTS),
    ]


_SIDE_POINTERS = (
    "g", "boundary", "states", "bounds", "norms", "last", "sums", "sum_decays", "stored", "stored_bounds",
    "wholes",
)  # fmt: skip
_SCAN_POINTERS = (
    "k", "v", "q", "x", "d_o", "y", "alpha", "beta", "x_scale", "y_scale", "key_weight",
    "start_weight", "first_maxima", "second_maxima", "key_maxima", "segments", "chunk_start", "chunk_length",
)  # fmt: skip
_SCAN_INTS = (
    "heads", "key_heads", "value_heads", "first_head", "group_heads", "segment_count",
)  # fmt: skip


class Side(ctypes.Structure):
    """`Side` of scan.cuh: one of the two states, or its gradient."""

    _fields_ = [(name, ctypes.c_void_p) for name in _SIDE_POINTERS]


class ScanArguments(ctypes.Structure):
    """`ScanArguments` of scan.cuh."""

    _fields_ = [
        ("h", Side),
        ("u", Side),
        *((name, ctypes.c_void_p) for name in _SCAN_POINTERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _SCAN_INTS),
    ]


VIEWS = ("q", "k", "v", "g", "gk", "alpha", "beta")
_STEP_POINTERS = ("h", "u", "indices", "bounds", "o", "x")
_STEP_LONGS = ("h_stride", "u_stride")
_STEP_INTS = (
    "num_iter", "length", "heads", "key_heads", "value_heads", "pool", "wide_indices", "commit",
)  # fmt: skip


class View(ctypes.Structure):
    """`View` of decode.cu."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("batch", "token", "head")),
    ]


class StepArguments(ctypes.Structure):
    """`StepArguments` of decode.cu."""

    _fields_ = [
        *((name, View) for name in VIEWS),
        *((name, ctypes.c_void_p) for name in _STEP_POINTERS),
        *((name, ctypes.c_longlong) for name in _STEP_LONGS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_int) for name in _STEP_INTS),
    ]


S = TypeVar("S", bound=ctypes.Structure)


def fill(structure: S, values: dict[str, Tensor | ctypes.Structure | float | int | None]) -> S:
    """Fill the fields by name from tensors and numbers; pointers that are not named, or None, are null.

    `structure.tensors` holds the tensors it points to, by the pointer's offset in bytes.
    """
    tensors: dict[int, Tensor] = getattr(structure, "tensors", {})
    for name, value in values.items():
        offset = getattr(type(structure), name).offset
        if isinstance(value, Tensor):
            tensors[offset] = value
            value = value.data_ptr()
        elif isinstance(value, ctypes.Structure):
            tensors |= {offset + inner: x for inner, x in value.tensors.items()}  # pyright: ignore[reportAttributeAccessIssue]
        setattr(structure, name, value)
    structure.tensors = tensors  # pyright: ignore[reportAttributeAccessIssue]
    return structure


def copy(structure: S) -> S:
    """A copy of the structure, which points to the same tensors."""
    made = type(structure).from_buffer_copy(structure)
    made.tensors = structure.tensors  # pyright: ignore[reportAttributeAccessIssue]
    return made
