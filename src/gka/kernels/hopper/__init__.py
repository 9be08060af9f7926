"""The op on Hopper (sm_90a) in CUDA C++, a chunk of 64 tokens and a head to a block.

`sums.cu`, `combine.cu`, `scan.cu`: H and U at chunk starts, and their gradients at chunk ends. `forward.cu`:
ridge, solve, mix, readout. `adjoint.cu`: readout's and mix's adjoint, solve. `gradients.cu`: keys, values,
decays, write gate. Tensor cores take float16 operands, each scaled by its largest entry; in the scans inputs
as they came, and weighted ones as pairs of numbers. Nothing here chooses or differentiates; the structures
mirror those of chunk.cuh and scan.cuh.
"""

import ctypes
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gka.kernels import nvrtc
from gka.kernels.configs import capability_of

DIMS = (64, 128)
CHUNK = 64
_PARTS = (
    "tensor_cores",
    "numbers",
    "decay",
    "chunk",
    "fragments",
    "ridge",
    "chebyshev",
    "adaptive",
    "system",
)
_GRADIENTS = ("inputs", "tiles", "through_u", "through_h")
BLOCKS = {64: 3, 128: 2}  # blocks a multiprocessor that the registers leave room for
_POINTERS = (
    "q", "k", "v", "g", "gk", "alpha", "beta", "h_states", "u_states", "h_scales", "h_norms",
    "u_scales", "chunk_start", "chunk_length", "o", "x", "x_scale", "steps", "d_o", "dq", "d_alpha",
    "y", "y_scale", "w", "key_weight", "start_weight", "start_u", "start_h",
    "u_ends", "h_ends", "u_end_scales", "u_wholes", "h_end_scales", "h_wholes", "k_maxima", "z_maxima",
    "v_maxima", "d_maxima", "dk", "dv", "dg", "dgk", "d_beta2",
)  # fmt: skip
_FLOATS = ("scale", "ridge_ratio", "empty_below")
_INTS = (
    "num_iter", "heads", "key_heads", "value_heads", "first_head", "group_heads", "first_chunk",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """chunk.cuh's structure of the same name."""

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
    """scan.cuh's structure of the same name: one of the two states, or its gradient."""

    _fields_ = [(name, ctypes.c_void_p) for name in _SIDE_POINTERS]


class ScanArguments(ctypes.Structure):
    """scan.cuh's structure of the same name."""

    _fields_ = [
        ("h", Side),
        ("u", Side),
        *((name, ctypes.c_void_p) for name in _SCAN_POINTERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _SCAN_INTS),
    ]


Given = Arguments | ScanArguments | Side


def fill(structure: Given, values: dict[str, Tensor | Side | float | int | None]) -> Given:
    """Its fields from tensors and numbers by name; pointers not named, or None, are null."""
    for name, value in values.items():
        setattr(structure, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return structure


def why_not(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], chunk: int
) -> str | None:
    """Why these kernels cannot run such inputs, K and V being `dims`; None if they can."""
    if device.type != "cuda" or torch.version.hip or capability_of(device) != (9, 0):
        return f"its kernels are for Hopper GPUs (H100, H200); got {device}."
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16; got {dtype}."
    if not set(dims) <= set(DIMS) or chunk != CHUNK:
        return f"its kernels take head dimensions {DIMS} and chunk_size = {CHUNK}; got {dims} and {chunk}."
    return nvrtc.why_missing()


SCAN_PARTS = {
    "sums": ("inputs", "decay", "scan", "state", "weights", "products"),
    "combine": ("scan",),
    "scan": ("inputs", "decay", "scan", "state", "weights", "products"),
}
SCANS = tuple(f"{part}_{direction}" for part in SCAN_PARTS for direction in ("states", "back"))


def source(kernel: str, key_dim: int, value_dim: int, bfloat16: bool, adaptive: bool) -> str:
    """One translation unit: `kernel` is a file's name here, or one of SCANS."""
    folder = Path(__file__).parent
    parts = [p for p in _PARTS if adaptive or p != "adaptive"]
    parts += _GRADIENTS if kernel == "gradients" else ()
    names = [*(f"{p}.cuh" for p in parts), f"{kernel}.cu"]
    if kernel in SCANS:
        part = kernel.split("_")[0]
        parts = ("tensor_cores", "numbers", *SCAN_PARTS[part])
        names = [*(f"{p}.cuh" for p in parts), f"{part}.cu"]
    text = [(folder / name).read_text() for name in names]
    head = (
        f"#define BF16 {int(bfloat16)}\n#define ADAPTIVE {int(adaptive)}\n"
        f"#define BLOCKS {BLOCKS[max(key_dim, value_dim)]}\n"
        f"#define BACKWARDS {int(kernel.endswith('_back'))}\n"
        f"constexpr int K = {key_dim}, V = {value_dim};\n"
    )
    return head + "\n".join(text)


def shared_bytes(kernel: str, key_dim: int, value_dim: int) -> int:
    """Upper bound of what `kernel` keeps in shared memory, with room to align it."""
    widest = max(key_dim, value_dim)
    if kernel.startswith("combine"):
        return 0
    if kernel.startswith("sums"):
        return 2 * CHUNK * 6 * widest + 4 * 28 * CHUNK + 1024
    if kernel in SCANS:
        tiles = CHUNK * (3 if kernel == "scan_back" else 4) + key_dim
        return 2 * widest * tiles + 4 * 24 * CHUNK + 1024
    if kernel == "gradients":
        tiles = key_dim * widest + CHUNK * (2 * key_dim + widest) + 2 * CHUNK * CHUNK
        return 2 * tiles + 4 * (15 * CHUNK + 8) + 1024
    tiles = 2 * (key_dim * key_dim + CHUNK * (key_dim + widest) + CHUNK * CHUNK)
    tiles += max(2 * key_dim * value_dim, 4 * CHUNK * key_dim)
    return tiles + 4 * (5 * CHUNK + 20) + 1024


_COMPILERS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="gka-compile")
SOLVES = ("forward", "adjoint")  # the kernels that differ with the solver
KERNELS = (*SOLVES, "gradients", *SCANS)


def threads_of(kernel: str, key_dim: int) -> int:
    """Of a block."""
    return 2 * key_dim if kernel.startswith(("sums", "scan")) else 128


def name_of(kernel: str) -> str:
    """Of its entry point."""
    return f"gka_{kernel.split('_')[0]}"


@functools.cache
def _cubins(
    key_dim: int, value_dim: int, bfloat16: bool, adaptive: bool
) -> dict[str, Future[bytes]]:
    """All kernels of such inputs, compiled side by side when the first is asked for."""
    return {
        kernel: _COMPILERS.submit(
            nvrtc.compile_cubin,
            source(kernel, key_dim, value_dim, bfloat16, adaptive and kernel in SOLVES),
            name_of(kernel),
            "sm_90a",
        )
        for kernel in KERNELS
    }


@functools.cache
def _kernel(
    device: int, kernel: str, key_dim: int, value_dim: int, bfloat16: bool, adaptive: bool
) -> nvrtc.Kernel:
    cubin = _cubins(key_dim, value_dim, bfloat16, adaptive)[kernel].result()
    threads = threads_of(kernel, key_dim)
    return nvrtc.Kernel(cubin, name_of(kernel), threads, shared_bytes(kernel, key_dim, value_dim))


def run(
    kernel: str, like: Tensor, value_dim: int, adaptive: bool, blocks: tuple[int, int], given: Given
) -> None:
    """Launch `kernel` on that many blocks (x, y) for inputs like q = `like`, on the current device."""
    bfloat16 = like.dtype == torch.bfloat16
    _kernel(like.device.index, kernel, like.shape[-1], value_dim, bfloat16, adaptive)(
        *blocks, given
    )
