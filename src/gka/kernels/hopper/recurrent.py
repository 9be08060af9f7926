"""`recurrent.cu`: one token after another with the states in place, a block a sequence and head."""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gka.kernels import nvrtc
from gka.kernels.configs import capability_of
from gka.maths.ridge import empty_below

if TYPE_CHECKING:
    from gka.maths.chunked import Settings
    from gka.maths.recurrent import States

DIMS = (64, 128)
# blocks a multiprocessor, by K and V
BLOCKS = {(64, 64): 8, (64, 128): 5, (128, 64): 3, (128, 128): 3}
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VIEWS = ("q", "k", "v", "g", "gk", "alpha", "beta")
_POINTERS = ("h", "u", "indices", "bounds", "o", "x")
_LONGS = ("h_stride", "u_stride")
_FLOATS = ("scale", "ridge_ratio", "empty_below")
_INTS = (
    "num_iter", "length", "heads", "key_heads", "value_heads", "pool", "wide_indices", "commit",
)  # fmt: skip


class View(ctypes.Structure):
    """recurrent.cu's structure of the same name."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("batch", "token", "head")),
    ]


class StepArguments(ctypes.Structure):
    """recurrent.cu's structure of the same name."""

    _fields_ = [
        *((name, View) for name in VIEWS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _LONGS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_int) for name in _INTS),
    ]


def why_not(device: torch.device, dims: tuple[int, int]) -> str | None:
    """Why this kernel cannot run such inputs, K and V being `dims`; None if it can."""
    if device.type != "cuda" or torch.version.hip or capability_of(device) != (9, 0):
        return f"its kernels are for Hopper GPUs (H100, H200); got {device}."
    if not set(dims) <= set(DIMS):
        return f"its kernel for single tokens takes head dimensions {DIMS}; got {dims}."
    return nvrtc.why_missing()


def source(dims: tuple[int, int], dtype: torch.dtype, u_dtype: torch.dtype, adaptive: bool) -> str:
    """The translation unit for q of `dtype` and U stored as `u_dtype`."""
    folder = Path(__file__).parent
    names = ("tensor_cores.cuh", "numbers.cuh", "recurrent.cu")
    head = (
        f"#define BF16 {int(dtype == torch.bfloat16)}\n#define FORMAT {FORMATS[dtype]}\n"
        f"#define U16 {int(u_dtype == torch.bfloat16)}\n#define ADAPTIVE {int(adaptive)}\n"
        f"#define BLOCKS {BLOCKS[dims]}\nconstexpr int K = {dims[0]}, V = {dims[1]};\n"
    )
    return head + "\n".join((folder / name).read_text() for name in names)


def shared_bytes(dims: tuple[int, int]) -> int:
    """Upper bound of sizeof(Shared)."""
    key_dim, value_dim = dims
    return 4 * (key_dim * value_dim + 9 * key_dim + value_dim + 5 * 5 * key_dim // 32 + 8)


@functools.cache
def _kernel(
    device: int, dims: tuple[int, int], dtype: torch.dtype, u_dtype: torch.dtype, adaptive: bool
) -> nvrtc.Kernel:
    cubin = nvrtc.compile_cubin(source(dims, dtype, u_dtype, adaptive), "gka_step", "sm_90a")
    return nvrtc.Kernel(cubin, "gka_step", dims[0], shared_bytes(dims))


def arguments(
    given: dict[str, Tensor | None], bounds: Tensor | None, settings: "Settings", states: "States",
    commit: bool, o: Tensor, x: Tensor | None,
) -> StepArguments:  # fmt: skip
    """What the kernel reads; `given` holds VIEWS by name."""

    def pointer(y: Tensor | None) -> int | None:
        return None if y is None else y.data_ptr()

    def view(y: Tensor | None) -> View:
        return View() if y is None else View(y.data_ptr(), y.stride(0), y.stride(1), y.stride(2))

    q, k, v = given["q"], given["k"], given["v"]
    assert q is not None and k is not None and v is not None
    h, u, indices = states.h, states.u, states.indices
    pointers = (h, u, indices, bounds, o, x)
    return StepArguments(
        *(view(given[name]) for name in VIEWS),
        *map(pointer, pointers),
        0 if h is None else h.stride(0),
        u.stride(0),
        settings.scale,
        settings.ridge_ratio,
        empty_below(torch.float32),
        settings.num_iter,
        q.shape[1],
        q.shape[2],
        k.shape[2],
        v.shape[2],
        u.shape[0],
        int(indices is not None and indices.dtype == torch.int64),
        int(commit),
    )


def step(
    given: dict[str, Tensor | None], bounds: Tensor | None, settings: "Settings", states: "States",
    commit: bool, o: Tensor, x: Tensor | None,
) -> None:  # fmt: skip
    """Launch on q, k, v and gates `given` by name; bounds int64 of packed sequences."""
    q, v = given["q"], given["v"]
    assert q is not None and v is not None
    bounds = None if bounds is None else bounds.long()
    sequences = q.shape[0] if bounds is None else bounds.numel() - 1
    dims, adaptive = (q.shape[3], v.shape[3]), settings.solver == "adaptive"
    kernel = _kernel(
        q.device.index, dims, q.dtype, states.u.dtype, adaptive and settings.num_iter > 0
    )
    given_all = arguments(given, bounds, settings, states, commit, o, x)
    kernel(sequences * q.shape[2], 1, given_all)
