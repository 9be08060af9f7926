"""The solve and readout of a chunk, their adjoint and the gradients, in CUDA C++ for Hopper (sm_90a).

Three kernels of one warpgroup a chunk and head: `forward.cu` (ridge, solve, mix, readout), `adjoint.cu`
(readout's and mix's adjoint, solve) and `gradients.cu` (of keys, values, decays and write gate). Tensor
cores take float16 operands, each scaled by its largest entry. Nothing here chooses or differentiates;
`arguments` mirrors the structure in chunk.cuh.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from gka.kernels import nvrtc

DIMS = (64, 128)
CHUNK = 64
_PARTS = ("tensor_cores", "chunk", "fragments", "ridge", "chebyshev", "adaptive", "system")
BLOCKS = {64: 3, 128: 2}  # blocks a multiprocessor that the registers leave room for
_POINTERS = (
    "q", "k", "v", "g", "gk", "alpha", "beta", "h_states", "u_states", "h_scales", "h_norms",
    "u_scales", "chunk_start", "chunk_length", "o", "x", "x_scale", "steps", "top",
    "trace", "d_o", "dq", "d_alpha",
    "y", "y_scale", "w", "key_weight", "start_weight", "start_u", "start_h",
    "u_ends", "h_ends", "u_end_scales", "u_wholes", "h_end_scales", "h_wholes", "k_maxima", "z_maxima",
    "v_maxima", "d_maxima", "dk", "dv", "dg", "dgk", "d_beta2",
)  # fmt: skip
_FLOATS = ("scale", "ridge_ratio", "empty_below")
_INTS = (
    "num_iter", "heads", "key_heads", "value_heads", "first_head", "group_heads", "first_chunk",
    "h_blocks", "stagger", "multiprocessors",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """chunk.cuh's structure of the same name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_int) for name in _INTS),
    ]


def arguments(**values: Tensor | float | int | None) -> Arguments:
    """The structure from tensors and numbers by name; pointers not named are null."""
    made = Arguments()
    for name, value in values.items():
        setattr(made, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return made


def why_not(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], chunk: int
) -> str | None:
    """Why these kernels cannot run such inputs, K and V being `dims`; None if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return f"its kernels are for Hopper GPUs (H100, H200); got {device}."
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16; got {dtype}."
    if not set(dims) <= set(DIMS) or chunk != CHUNK:
        return f"its kernels take head dimensions {DIMS} and chunk_size = {CHUNK}; got {dims} and {chunk}."
    return nvrtc.why_missing()


def source(kernel: str, key_dim: int, value_dim: int, bfloat16: bool, adaptive: bool) -> str:
    """One translation unit."""
    folder = Path(__file__).parent
    parts = [folder / f"{p}.cuh" for p in _PARTS if adaptive or p != "adaptive"]
    text = [path.read_text() for path in (*parts, folder / f"{kernel}.cu")]
    head = (
        f"#define BF16 {int(bfloat16)}\n#define ADAPTIVE {int(adaptive)}\n"
        f"#define BLOCKS {BLOCKS[max(key_dim, value_dim)]}\n"
        f"constexpr int K = {key_dim}, V = {value_dim};\n"
    )
    return head + "\n".join(text)


def shared_bytes(kernel: str, key_dim: int, value_dim: int) -> int:
    """Upper bound of what `kernel` keeps in shared memory, with room to align it."""
    if kernel == "certify":
        return 2 * key_dim * key_dim + 4 * (key_dim + 8) + 1024
    widest = max(key_dim, value_dim)
    if kernel == "gradients":
        tiles = key_dim * widest + CHUNK * (2 * key_dim + widest) + 2 * CHUNK * CHUNK
        return 2 * tiles + 4 * 15 * CHUNK + 1024
    tiles = 2 * (key_dim * key_dim + CHUNK * (key_dim + widest) + CHUNK * CHUNK)
    tiles += max(2 * key_dim * value_dim, 4 * CHUNK * key_dim)
    return tiles + 4 * (5 * CHUNK + 2 * key_dim + 16) + 1024


@functools.cache
def _kernel(
    device: int, kernel: str, key_dim: int, value_dim: int, bfloat16: bool, adaptive: bool
) -> nvrtc.Kernel:
    text = source(kernel, key_dim, value_dim, bfloat16, adaptive)
    cubin = nvrtc.compile_cubin(text, f"gka_{kernel}", "sm_90a")
    return nvrtc.Kernel(cubin, f"gka_{kernel}", 128, shared_bytes(kernel, key_dim, value_dim))


def run(
    kernel: str, like: Tensor, value_dim: int, adaptive: bool, blocks: int, given: Arguments
) -> None:
    """Launch `kernel` ("forward", "adjoint" or "gradients") for inputs like q = `like` on their device."""
    with torch.cuda.device(like.device):
        launch = _kernel(
            like.device.index,
            kernel,
            like.shape[-1],
            value_dim,
            like.dtype == torch.bfloat16,
            adaptive,
        )
        launch(blocks, given)
