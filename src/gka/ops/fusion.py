"""Whether the kernels for what surrounds the op in a layer can run: convolutions, gates and norm."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

WIDEST_CONVOLUTION = 8
WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_fused(
    device: torch.device | str,
    dtype: torch.dtype,
    dims: tuple[int, int] = (128, 128),
    width: int = 4,
) -> str | None:
    """Why the kernels cannot run inputs of this device and dtype; None if they can.

    Args:
        dims: K and V. width: of the convolutions.
    """
    device = torch.device(device)
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16; got {dtype}."
    if max(dims) > WIDEST_HEAD:
        return f"the kernels take heads up to {WIDEST_HEAD} wide; got K = {dims[0]}, V = {dims[1]}."
    if width > WIDEST_CONVOLUTION:
        return f"the kernels take conv_size up to {WIDEST_CONVOLUTION}; got {width}."
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed."
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, slow); got {device}."
    from gka.kernels import configs

    return configs.why_not_chip(device)


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Kernels trust their arguments' shapes.

    Raises:
        ValueError: x has another shape.
    """
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}; got {list(x.shape)}.")


def current(x: Tensor) -> AbstractContextManager:
    """Launches go to the current device: inside, that of x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def refuse_second(name: str):
    """What a derivative of a derivative ends with."""
    raise RuntimeError(
        f"{name} has no second derivative. "
        'Use backend="reference" (of a layer: its argument or attribute) for second derivatives.'
    )
