"""Head counts and sizes, and the learned expansion of grouped keys or values to one for every head."""

import math
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gka.ops.checks import MAX_HEAD_DIM, check_flags


class HeadCounts(TypedDict):
    """Heads of queries, keys and values."""

    num_heads: int
    num_k_heads: int
    num_v_heads: int


def default_head_dim(hidden_size: int, num_heads: int) -> int:
    """The default head size of a configuration or recipe: hidden_size / num_heads, rounded down."""
    return hidden_size // num_heads


def split_heads(
    num_heads: int,
    num_kv_heads: int | None,
    num_v_heads: int | None = None,
    num_k_heads: int | None = None,
) -> HeadCounts:
    """Counts with grouped keys and values (num_kv_heads), with more value heads (num_v_heads), or with
    each count given (num_k_heads and num_v_heads).

    Raises:
        ValueError: arguments that exclude each other, or counts that do not divide.
    """
    if num_k_heads is not None:
        return _each_count(num_heads, num_k_heads, num_v_heads, num_kv_heads)
    if num_kv_heads is not None and num_v_heads is not None:
        raise ValueError(
            "num_kv_heads (fewer key and value heads than queries) and num_v_heads (more value "
            f"heads) exclude each other, got {num_kv_heads} and {num_v_heads}: leave one None"
        )
    counts = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_v_heads": num_v_heads}
    check_positive(**{name: count for name, count in counts.items() if count is not None})
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}"
        )
    if num_v_heads is not None and num_v_heads % num_heads:
        raise ValueError(
            f"num_v_heads = {num_v_heads} must be a multiple of num_heads = {num_heads}"
        )
    num_k_heads = num_kv_heads or num_heads
    return HeadCounts(
        num_heads=num_heads, num_k_heads=num_k_heads, num_v_heads=num_v_heads or num_k_heads
    )


def _each_count(
    num_heads: int, num_k_heads: int, num_v_heads: int | None, num_kv_heads: int | None
) -> HeadCounts:
    if num_kv_heads is not None:
        raise ValueError(
            f"num_k_heads = {num_k_heads} and num_kv_heads = {num_kv_heads} both count key heads: leave "
            "one None"
        )
    num_v_heads = num_k_heads if num_v_heads is None else num_v_heads
    counts = HeadCounts(num_heads=num_heads, num_k_heads=num_k_heads, num_v_heads=num_v_heads)
    check_positive(num_heads=num_heads, num_k_heads=num_k_heads, num_v_heads=num_v_heads)
    most = max(num_heads, num_k_heads, num_v_heads)
    uneven = [f"{name} = {count}" for name, count in counts.items() if most % cast(int, count)]
    if uneven:
        every = ", ".join(f"{name} = {count}" for name, count in counts.items())
        raise ValueError(
            f"{', '.join(uneven)} must divide {most}, the greatest of the head counts ({every})"
        )
    return counts


def value_dim(head_dim: int, expand_v: float) -> int:
    """V = expand_v * head_dim.

    Raises:
        ValueError: it is not a positive integer.
    """
    if not isinstance(expand_v, int | float) or not math.isfinite(expand_v):
        raise ValueError(f"expand_v must be a number, got {expand_v!r}")
    head_v_dim = round(head_dim * expand_v)
    if head_v_dim < 1 or not math.isclose(head_dim * expand_v, head_v_dim, rel_tol=1e-5):
        raise ValueError(
            f"expand_v * head_dim must be a positive integer, got {expand_v} * {head_dim}"
        )
    return head_v_dim


def check_head_dims(head_dim: int, head_v_dim: int) -> None:
    """Check that K and V of a recurrent mixer are in its op's range, the same in every backend.

    Raises:
        ValueError: one is not.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}: take more heads instead"
        )
    if head_v_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"expand_v * head_dim must be at most {MAX_HEAD_DIM}, got {head_v_dim}: take more heads instead"
        )


def rotary_dim(hidden_size: int, num_heads: int, head_dim: int | None) -> int:
    """head_dim, or hidden_size / num_heads if it is None.

    Raises:
        ValueError: it does not divide, or is odd.
    """
    check_positive(hidden_size=hidden_size, num_heads=num_heads)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size = {hidden_size} must be a multiple of num_heads = {num_heads}, "
                "or head_dim be given"
            )
        head_dim = hidden_size // num_heads
    check_positive(head_dim=head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    return head_dim


def check_positive(**sizes: int) -> None:
    """Check that each size is a positive integer.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_options(norm_eps: float, layer_idx: int | None, **flags: bool) -> None:
    """Check that a mixer's epsilon is positive, its layer_idx a count, and each flag a bool.

    Raises:
        ValueError: a number is out of range.
        TypeError: a flag is not a bool.
    """
    number = isinstance(norm_eps, int | float) and not isinstance(norm_eps, bool)
    if not (number and 0 <= norm_eps < math.inf):
        raise ValueError(f"norm_eps must be 0 or more, got {norm_eps!r}")
    whole = isinstance(layer_idx, int) and not isinstance(layer_idx, bool)
    if layer_idx is not None and not (whole and layer_idx >= 0):
        raise ValueError(f"layer_idx must be None or 0, 1, ..., got {layer_idx!r}")
    check_flags(**flags)


class ZeroLinear(nn.Linear):
    """A linear map without bias that starts as zero."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class HeadExpansion(nn.Module):
    """y = up(SiLU(down(x))) + heads of x, each head repeated or, with `learned_mix`, mixed by a matrix.

    It starts as the repetition: `up` is zero, and the matrix repeats heads.

    Args:
        in_heads: heads of x.
        heads: heads of y, a multiple of in_heads greater than it.
        head_dim: size of a head.
        rank: width between the two maps.
        learned_mix: whether a learned matrix [heads, in_heads] replaces the repetition.

    Raises:
        ValueError: sizes that do not fit.
    """

    mix: nn.Parameter  # with learned_mix
    head_range: slice | None = None  # the heads of y that this rank has; None: all

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
            if self.head_range is not None:
                repeated = repeated[:, :, self.head_range]
        return self.up(F.silu(self.down(x))) + repeated.flatten(-2)
