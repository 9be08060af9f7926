"""Launch configurations: warps, pipeline stages and register caps by chip class, kernel and head width.

Made with `python -m benchmarks.resources`, which tells what each takes.
"""

import functools

import torch

# kernel -> (warps, stages, cap on registers or None) for heads up to 64, 128 and 256 wide
Table = dict[str, tuple[tuple[int, int, int | None], ...]]

HOPPER: Table = {
    "moments": ((4, 3, None), (4, 3, 168), (8, 2, None)),
    "solve": ((4, 1, None), (4, 1, None), (8, 1, None)),
    "readout": ((4, 1, None), (4, 1, None), (8, 1, None)),
    "readout_backward": ((4, 1, None), (4, 1, None), (8, 1, None)),
    "reverse_u": ((4, 2, None), (4, 2, None), (8, 1, None)),
    "reverse_h": ((4, 2, None), (4, 2, None), (8, 1, None)),
    "through_u": ((4, 1, None), (4, 1, None), (8, 1, None)),
    "through_h": ((4, 1, None), (4, 1, None), (8, 1, None)),
}
# without warp-group products 4 warps hold too little of a gradient kernel's tiles
AMPERE: Table = HOPPER | {
    "through_u": ((4, 1, None), (8, 1, None), (8, 1, None)),
    "through_h": ((4, 1, None), (8, 1, None), (8, 1, None)),
}
# 100 KB of shared memory a multiprocessor
SMALL: Table = AMPERE | {"through_u": ((4, 1, None), (8, 1, None), (4, 1, None))}

WIDTHS = (64, 128, 256)
CHUNK_SIZES = (16, 32, 64)
OLDEST = (8, 0)  # compute capability: before it there is no bfloat16 product


def table_of(capability: tuple[int, int]) -> Table:
    """The configurations for a chip of that compute capability."""
    if capability[0] >= 9:
        return HOPPER
    return AMPERE if capability == (8, 0) else SMALL


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; that of Hopper where the kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def widest(exact: bool, device: torch.device) -> int:
    """The widest heads whose tiles fit the chip's shared memory; `exact`: float32 operands."""
    if not exact or device.type != "cuda":
        return WIDTHS[-1]
    return 128 if capability_of(device)[0] >= 9 else 64


def why_not_chip(device: torch.device) -> str | None:
    """Why no Triton kernel can run there; None if they can."""
    if device.type == "cuda" and torch.version.hip is not None:
        return (
            "its kernels were written for NVIDIA GPUs and never run on another; this is one of AMD."
        )
    if capability_of(device) < OLDEST:
        return (
            f"its kernels need compute capability {OLDEST}; {device} has {capability_of(device)}."
        )
    return None


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


def config(kernel: str, width: int, exact: bool, device: torch.device) -> dict:
    """Launch options of a kernel for heads of that width; `exact`: float32 operands."""
    bucket = next(i for i, limit in enumerate(WIDTHS) if width <= limit)
    warps, stages, registers = table_of(capability_of(device))[kernel][bucket]
    options = {"num_warps": warps, "num_stages": 1 if exact else stages}
    return options if registers is None else options | {"maxnreg": registers}
