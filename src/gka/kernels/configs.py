"""Launch configurations by chip, kernel, operands and head width, and which inputs the kernels can run.

The tables are chips/sm_<compute capability>.json. `python -m benchmarks.run tune` measures and writes them;
`python -m benchmarks.run resources` shows each kernel's registers and shared memory.
"""

import functools
import json
from pathlib import Path

import torch

CHIPS = Path(__file__).parent / "chips"
# kernel -> "16-bit" or "float32" -> widest head -> num_warps, num_stages and, if capped, maxnreg
Table = dict[str, dict[str, dict[str, dict[str, int]]]]

WIDTHS = (64, 128, 256)
CHUNK_SIZES = (16, 32, 64)
NO_GPU = "torch sees no GPU here: none is there, or this build of torch has no CUDA."
OLDEST = (8, 0)  # compute capability: older chips have no bfloat16 product


def table_file(capability: tuple[int, int]) -> Path:
    """The table of that chip, or of the chip nearest to it in shared memory and tensor cores."""
    own = CHIPS / f"sm_{capability[0]}{capability[1]}.json"
    return own if own.exists() else CHIPS / f"sm_{90 if capability[0] >= 9 else 86}.json"


@functools.cache
def table_of(capability: tuple[int, int]) -> Table:
    """The configurations for a chip of that compute capability."""
    return json.loads(table_file(capability).read_text())["launch"]


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; Hopper's for interpreted kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def widest(exact: bool, device: torch.device) -> int:
    """The widest heads whose tiles fit the chip's shared memory; `exact`: float32 operands."""
    if not exact or device.type != "cuda":
        return WIDTHS[-1]
    return 128 if capability_of(device)[0] >= 9 else 64


def why_not_chip(device: torch.device) -> str | None:
    """Why no Triton kernel can run there; None if they can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    if device.type == "cuda" and torch.version.hip is not None:
        return (
            "its kernels were written for NVIDIA GPUs and never run on another; this is one of AMD."
        )
    if capability_of(device) < OLDEST:
        return (
            f"its kernels need compute capability {OLDEST}; {device} has {capability_of(device)}."
        )
    return None


def widest_certificate(exact: bool, device: torch.device) -> int:
    """The widest keys whose certificate fits the shared memory; 128 in float32 would take 344 KB."""
    return 64 if exact and device.type == "cuda" else WIDTHS[-1]


def why_not(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], chunk_size: int
) -> str | None:
    """Why the Triton kernels cannot run such inputs, K and V being `dims`; None if they can."""
    reason = why_not_chip(device)
    if reason is not None:
        return reason
    if dtype == torch.float64:
        return "its kernels compute in float32 at best; got float64."
    if chunk_size not in CHUNK_SIZES:
        return f"its kernels take chunk_size in {CHUNK_SIZES}; got chunk_size = {chunk_size}."
    limit = widest(dtype == torch.float32, device)
    if max(dims) > limit:
        return f"its kernels take {dtype} heads up to {limit} wide here; got K = {dims[0]}, V = {dims[1]}."
    return None


def operands(exact: bool) -> str:
    """The tables' key for a dtype class; `exact`: float32 operands."""
    return "float32" if exact else "16-bit"


def bucket(width: int) -> str:
    """The tables' key for a head width."""
    return str(next(limit for limit in WIDTHS if width <= limit))


def config(kernel: str, width: int, exact: bool, device: torch.device) -> dict[str, int]:
    """Launch options of a kernel for heads of that width; `exact`: float32 operands."""
    return table_of(capability_of(device))[kernel][operands(exact)][bucket(width)]
