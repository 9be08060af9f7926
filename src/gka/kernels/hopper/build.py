"""The kernels' sources, their shared memory, and their machine code, compiled on first use and kept on disk.

A translation unit is `#define`s of its sizes and a `.cu` file; NVRTC gets the headers from memory.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from gka.kernels import cubins
from gka.kernels.configs import NO_GPU, capability_of
from gka.kernels.driver import Kernel
from gka.kernels.hopper import nvrtc
from gka.maths.moments import reset_floor
from gka.maths.solvers.adaptive import THETA_FLOOR, WORTHWHILE
from gka.maths.solvers.cg import LARGEST_ENTRY, LARGEST_SIZE, LEAST_CURVATURE, LEAST_UNIT

DIMS = (64, 128)
CHUNK = 64
BLOCKS = {64: 3, 128: 2}  # blocks per multiprocessor, limited by registers
# The same for decode.cu, by K and V.
DECODE_BLOCKS = {(64, 64): 8, (64, 128): 5, (128, 64): 3, (128, 128): 3}
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # decode.cu's dtypes
SOLVES = ("forward", "adjoint")  # the kernels that depend on the solver
SCANS = tuple(
    f"{part}_{direction}"
    for part in ("sums", "combine", "scan")
    for direction in ("states", "back")
)
KERNELS = (*SOLVES, "gradients", *SCANS)
ARCHITECTURE = "sm_90a"
FOLDER = Path(__file__).parent
Solve = Literal["chebyshev", "adaptive", "cg", "cg, small ridge"]


def why_not_here(device: torch.device) -> str | None:
    """Why no kernel of this backend can run on that device; None if they can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    if device.type != "cuda" or torch.version.hip or capability_of(device) != (9, 0):
        return f"its kernels are for Hopper GPUs (H100, H200); got {device}."
    return None


def why_not(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], chunk: int
) -> str | None:
    """Why these kernels cannot run such inputs, K and V being `dims`; None if they can."""
    reason = why_not_here(device)
    if reason is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16; got {dtype}."
    if not set(dims) <= set(DIMS) or chunk != CHUNK:
        return f"its kernels take head dimensions {DIMS} and chunk_size = {CHUNK}; got {dims} and {chunk}."
    return nvrtc.why_missing()


def why_not_step(device: torch.device, dims: tuple[int, int]) -> str | None:
    """Why decode.cu cannot run such inputs, K and V being `dims`; None if it can."""
    reason = why_not_here(device)
    if reason is not None:
        return reason
    if not set(dims) <= set(DIMS):
        return f"its kernel for single tokens takes head dimensions {DIMS}; got {dims}."
    return nvrtc.why_missing()


@functools.cache
def headers() -> dict[str, str]:
    """The texts of the headers, by name."""
    return {path.name: path.read_text() for path in sorted(FOLDER.glob("*.cuh"))}


def file_of(kernel: str) -> str:
    """The file of a kernel; a scan's file has both directions, "_states" and "_back"."""
    return f"{kernel.split('_')[0]}.cu"


def name_of(kernel: str) -> str:
    """The name of the kernel's entry point."""
    return f"gka_{kernel.split('_')[0]}"


def shared_numbers() -> str:
    """`#define`s of the constants that the kernels share with `gka.maths`, where they are declared."""
    floats = {
        "RESET": reset_floor(torch.float32),
        "THETA_FLOOR": THETA_FLOOR,
        "FLOAT32_EPS": torch.finfo(torch.float32).eps,
        "LEAST_UNIT": LEAST_UNIT,
        "LEAST_CURVATURE": LEAST_CURVATURE,
        "LARGEST_SIZE": LARGEST_SIZE,
        "LARGEST_ENTRY": LARGEST_ENTRY,
        "FLOAT32_MAX": torch.finfo(torch.float32).max,
    }
    lines = [f"#define {name} ({x.hex()}f)" for name, x in floats.items()]
    lines += [f"#define WORTHWHILE {WORTHWHILE[0]}", f"#define WORTHWHILE_OF {WORTHWHILE[1]}"]
    return "\n".join(lines) + "\n"


def solver_defines(solver: Solve) -> str:
    """The `#define`s that choose the solver."""
    flags = {
        "ADAPTIVE": solver == "adaptive",
        "CG": solver.startswith("cg"),
        "SMALL_RIDGE": solver == "cg, small ridge",
    }
    return "".join(f"#define {name} {int(flag)}\n" for name, flag in flags.items())


def defines(kernel: str, key_dim: int, value_dim: int, bfloat16: bool, solver: Solve) -> str:
    """The `#define`s before a chunk or scan kernel's file."""
    return shared_numbers() + (
        f"#define BF16 {int(bfloat16)}\n{solver_defines(solver)}"
        f"#define BLOCKS {BLOCKS[max(key_dim, value_dim)]}\n"
        f"#define BACKWARDS {int(kernel.endswith('_back'))}\n"
        f"constexpr int K = {key_dim}, V = {value_dim};\n"
    )


def source(kernel: str, key_dim: int, value_dim: int, bfloat16: bool, solver: Solve) -> str:
    """The translation unit of one of KERNELS."""
    head = defines(kernel, key_dim, value_dim, bfloat16, solver)
    return head + (FOLDER / file_of(kernel)).read_text()


def step_defines(
    dims: tuple[int, int], dtype: torch.dtype, u_dtype: torch.dtype, solver: Solve
) -> str:
    """The `#define`s before decode.cu for q of `dtype` and U stored as `u_dtype`."""
    return shared_numbers() + (
        f"#define BF16 {int(dtype == torch.bfloat16)}\n#define FORMAT {FORMATS[dtype]}\n"
        f"#define U16 {int(u_dtype == torch.bfloat16)}\n{solver_defines(solver)}"
        f"#define BLOCKS {DECODE_BLOCKS[dims]}\nconstexpr int K = {dims[0]}, V = {dims[1]};\n"
    )


def step_source(
    dims: tuple[int, int], dtype: torch.dtype, u_dtype: torch.dtype, solver: Solve
) -> str:
    """The translation unit of decode.cu."""
    return step_defines(dims, dtype, u_dtype, solver) + (FOLDER / "decode.cu").read_text()


def shared_bytes(kernel: str, key_dim: int, value_dim: int) -> int:
    """Upper bound of the bytes of shared memory that `kernel` takes, alignment included."""
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


def step_shared_bytes(dims: tuple[int, int]) -> int:
    """Upper bound of sizeof(Shared) in decode.cu."""
    key_dim, value_dim = dims
    return 4 * (key_dim * value_dim + 9 * key_dim + value_dim + 5 * 5 * key_dim // 32 + 8)


def threads_of(kernel: str, key_dim: int) -> int:
    """Threads per block."""
    return 2 * key_dim if kernel.startswith(("sums", "scan")) else 128


_COMPILERS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="gka-compile")


def compile_cubin(source: str, name: str) -> bytes:
    """The machine code of one of this folder's translation units, from disk where it was compiled before.

    Raises:
        CompilationError: NVRTC refused the source; the message has its log.
    """
    return cubins.kept(
        _parts(source, name),
        lambda: nvrtc.compile_cubin(source, name, ARCHITECTURE, headers()),
    )


def _parts(source: str, name: str) -> Iterator[str]:
    """All that a kernel's machine code depends on."""
    yield nvrtc.version()
    yield from nvrtc.options_for(ARCHITECTURE)
    yield from (name, source)
    for header, text in headers().items():
        yield from (header, text)


@functools.cache
def _cubin(
    kernel: str, key_dim: int, value_dim: int, bfloat16: bool, solver: Solve
) -> Future[bytes]:
    """The machine code of a kernel, compiled once; "chebyshev" where the solver does not matter."""
    text = source(kernel, key_dim, value_dim, bfloat16, solver)
    return _COMPILERS.submit(compile_cubin, text, name_of(kernel))


@functools.cache
def kernel_of(
    device: int, kernel: str, key_dim: int, value_dim: int, bfloat16: bool, solver: Solve
) -> Kernel:
    """One of KERNELS, loaded on that device. The first request compiles all of them, in parallel."""
    compiling = {
        name: _cubin(name, key_dim, value_dim, bfloat16, solver if name in SOLVES else "chebyshev")
        for name in KERNELS
    }
    threads, shared = threads_of(kernel, key_dim), shared_bytes(kernel, key_dim, value_dim)
    return Kernel(compiling[kernel].result(), name_of(kernel), threads, shared)


@functools.cache
def step_kernel_of(
    device: int, dims: tuple[int, int], dtype: torch.dtype, u_dtype: torch.dtype, solver: Solve
) -> Kernel:
    """decode.cu's kernel, loaded on that device."""
    cubin = compile_cubin(step_source(dims, dtype, u_dtype, solver), "gka_step")
    return Kernel(cubin, "gka_step", dims[0], step_shared_bytes(dims))
