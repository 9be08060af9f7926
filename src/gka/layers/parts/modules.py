"""What stands between a mixer's projections and its memory: norms, rotary positions, the convolution."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs: what sums, gates and norms are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (|x|_2 + eps) over the last dimension, in the dtype of x."""
    wide = x.to(working_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / (norm + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps).

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def normalize(self, x: Tensor) -> Tensor:
        """The result in the working dtype."""
        dtype = working_dtype(x)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of x."""
        return self.normalize(x).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * SiLU(gate), the norm first."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[..., dim], [..., dim] -> [..., dim], in the dtype of x."""
        return (self.normalize(x) * F.silu(gate.to(working_dtype(x)))).to(x.dtype)


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


class ShortConvolution(nn.Module):
    """y_t = SiLU(sum_i weight[:, 0, i] x_{t-W+1+i}): each channel sees its last W inputs.

    Args:
        channels: C.
        width: W >= 1, inputs seen.

    Attributes:
        weight: [C,1,W], the last column is that of the current input. No bias.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, channels: int, width: int = 4):
        super().__init__()
        if width < 1:
            raise ValueError(f"the convolution's width (conv_size) must be at least 1, got {width}")
        self.channels = channels
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Convolve.

        Args:
            x: inputs [B,T,C].
            state: the W inputs before x [B,C,W], the newest last; None for zeros.
            cu_seqlens: bounds [N+1] of sequences packed into B = 1, which do not see each other.

        Returns:
            [B,T,C].
        """
        past = self.width - 1
        if cu_seqlens is not None:
            slots = self._slots(cu_seqlens, x.shape[1])
            gapped = x.new_zeros(1, x.shape[1] + past * (cu_seqlens.shape[0] - 1), self.channels)
            x = gapped.index_copy(1, slots, x)
            return self._convolve(F.pad(x.mT, (past, 0))).mT.index_select(1, slots)
        if state is None:
            return self._convolve(F.pad(x.mT, (past, 0))).mT
        return self._convolve(torch.cat([state[..., 1:], x.mT], -1)).mT

    def next_state(self, x: Tensor, state: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        """The state after x: the last W inputs [B,C,W].

        Args:
            x: inputs [B,T,C].
            state: the W inputs before x; None for zeros.
            lengths: how many of each row's T inputs count [B]; None for all.
        """
        # Spares a copy of x. A compiler sees that by itself, and would bind its graph to T >= W.
        if lengths is None and not torch.compiler.is_compiling():
            x = x[:, -self.width :]
        seen = F.pad(x.mT, (self.width, 0)) if state is None else torch.cat([state, x.mT], -1)
        if lengths is None:
            return seen[..., -self.width :]
        columns = lengths[:, None] + torch.arange(self.width, device=x.device)
        # not take_along_dim, which binds a compiled graph to B and T
        return seen.gather(-1, columns[:, None].expand(-1, seen.shape[1], -1))

    def _convolve(self, x: Tensor) -> Tensor:
        """[B,C,W-1+T] -> [B,C,T]."""
        return F.silu(F.conv1d(x, self.weight, groups=self.channels))

    def _slots(self, cu_seqlens: Tensor, length: int) -> Tensor:
        """Where to put each packed token so that W - 1 zeros precede every sequence but the first."""
        tokens = torch.arange(length, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
        return tokens + (self.width - 1) * sequence
