"""Learned expansion of grouped keys or values to one for every head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gka.layers.parts.heads import check_positive


class ZeroLinear(nn.Linear):
    """A linear map without bias that starts as zero."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class HeadExpansion(nn.Module):
    """y = up(SiLU(down(x))) + heads of x, each head repeated or, with `learned_mix`, mixed by a matrix.

    At the start it is the repetition: `up` is zero, and the matrix repeats.

    Args:
        in_heads: heads of x.
        heads: heads of y, a multiple of in_heads greater than it.
        head_dim: size of a head.
        rank: width between the two maps.
        learned_mix: whether the repetition is a learned matrix [heads, in_heads].

    Raises:
        ValueError: sizes that do not fit.
    """

    mix: nn.Parameter  # with learned_mix

    def __init__(self, in_heads: int, heads: int, head_dim: int, rank: int, learned_mix: bool):
        super().__init__()
        check_positive(kv_rank=rank)
        if heads % in_heads or heads == in_heads:
            raise ValueError(
                f"kv_rank = {rank} expands grouped heads: {in_heads} key or value heads must be fewer than, "
                f"and divide, the {heads} heads"
            )
        self.group, self.head_dim = heads // in_heads, head_dim
        self.learned_mix = learned_mix
        self.down = nn.Linear(in_heads * head_dim, rank, bias=False)
        self.up = ZeroLinear(rank, heads * head_dim)
        if learned_mix:
            self.mix = nn.Parameter(torch.empty(heads, in_heads))
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the matrix, the one parameter not in a submodule, repeat each head."""
        if self.learned_mix:
            like = {"device": self.mix.device, "dtype": self.mix.dtype}
            self.mix.copy_(torch.eye(self.mix.shape[1], **like).repeat_interleave(self.group, 0))

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,in_heads*head_dim] -> [B,T,heads*head_dim]."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        if self.learned_mix:
            repeated = torch.einsum("eh,bthd->bted", self.mix, heads)
        else:
            repeated = heads.repeat_interleave(self.group, dim=2)
        return self.up(F.silu(self.down(x))) + repeated.flatten(-2)
