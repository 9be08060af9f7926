"""Short causal depthwise convolution over time, followed by SiLU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
