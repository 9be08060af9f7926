"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

import torch
from torch import Tensor

from gka.layers.parts.norms import working_dtype


def rotate(
    x: Tensor,
    positions: Tensor,
    theta: float = 10000.0,
    inv_freq: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Turn the pair (x_i, x_{i+D/2}) of the token at position p by the angle p theta^(-2i/D).

    Products of rotated queries and keys depend on the difference of their positions only.

    Args:
        x: [B,T,H,D], D even.
        positions: integers [B,T] or [1,T].
        theta: base of the wavelengths.
        inv_freq: angles a position [D/2], instead of theta^(-2i/D).
        scale: factor of the result.

    Returns:
        [B,T,H,D] in the dtype of x; angles are float32 (float64 for float64 x).
    """
    dtype, half = working_dtype(x), x.shape[-1] // 2
    if inv_freq is None:
        even = torch.arange(0, 2 * half, 2, device=x.device, dtype=dtype)
        inv_freq = 1.0 / theta ** (even / (2 * half))
    angles = positions[..., None, None].to(dtype) * inv_freq.to(dtype)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    first, second = x.to(dtype).split(half, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
