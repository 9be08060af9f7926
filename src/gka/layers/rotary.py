"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

import torch
from torch import Tensor

from gka.layers.norms import working_dtype


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Turn the pair (x_i, x_{i+D/2}) of the token at position p by the angle p theta^(-2i/D).

    Products of rotated queries and keys depend on the difference of their positions only.

    Args:
        x: [B,T,H,D], D even.
        positions: integers [B,T] or [1,T].
        theta: base of the wavelengths.

    Returns:
        [B,T,H,D] in the dtype of x; angles are float32 (float64 for float64 x).
    """
    dtype, half = working_dtype(x), x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=dtype) / half
    angles = positions[..., None, None].to(dtype) * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).split(half, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
