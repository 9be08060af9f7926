"""Modules between a mixer's projections and its memory: norms, rotary positions, convolution, decay."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, gates and norms: float32, or float64 for float64 inputs."""
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

    Products of rotated queries and keys depend only on the difference of their positions.

    Args:
        x: [B,T,H,D], D even.
        positions: integers [B,T] or [1,T].
        theta: base of the wavelengths.
        inv_freq: angles per position [D/2], instead of theta^(-2i/D).
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
        weight: [C,1,W]; the last column applies to the current input. No bias.

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
            lengths: number of each row's inputs that enter the state [B]; None: T.
        """
        # Avoids a copy of x. A compiler avoids it by itself, and this branch would bind its graph to T >= W.
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
        """The place of each packed token that leaves W - 1 zeros before every sequence but the first."""
        tokens = torch.arange(length, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
        return tokens + (self.width - 1) * sequence


DECAY_PARAMETERS = ("A_log", "dt_bias")
"""Parameters of the decay exp(A_log) softplus(. + dt_bias), which acts at every token: rounding them to half
precision would compound over the sequence, and weight decay would change how long the memory lasts."""

MOST_DECAY = 1e30  # exp(-1e30) is 0, and products with a gradient stay finite
MOST_LOG_RATE = 60.0  # e^60 times a gradient is finite, and g = -1e-12 needs no subnormal softplus


class DecayParameters(nn.Module):
    """A module that holds `DECAY_PARAMETERS` directly.

    They stay float32 or wider, and unrounded, through `.to(dtype)`, `.half()`, `.bfloat16()`, a default dtype
    and `load_state_dict(assign=True)`. They carry `_no_weight_decay = True`, also in copies, after `to_empty`
    and when a loader assigns new ones.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def log_decay(self, a: Tensor) -> Tensor:
        """g = -exp(A_log) softplus(a + dt_bias) of a [B,T,H], finite: inf times 0 would be NaN.

        The excess s of A_log over MOST_LOG_RATE moves into the softplus: e^s softplus(x) = softplus(x + s)
        for x + s << 0. Elsewhere both forms are a decay of 0.
        """
        A_log = self.A_log.to(a.dtype)
        # a separate clamp instead of a subtraction: ordinary gradients get no rounding
        shift = self.dt_bias.to(a.dtype) + F.relu(A_log - MOST_LOG_RATE)
        rate = A_log.clamp_max(MOST_LOG_RATE).exp()
        return -(rate * F.softplus(a + shift)).clamp_max(MOST_DECAY)

    def _add_decay_parameters(self, heads: int) -> None:
        """A_log and dt_bias [heads], without values."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name in DECAY_PARAMETERS:
            setattr(self, name, nn.Parameter(torch.empty(heads, dtype=dtype)))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as in `nn.Module`, which also assigns parameters through this method."""
        super().register_parameter(name, param)
        if name in DECAY_PARAMETERS:
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, in which tensors have lost their marks."""
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """The common implementation of `.to`, `.half`, `.cuda` and `to_empty`."""
        own = [p for p in map(self._parameters.get, DECAY_PARAMETERS) if p is not None]
        kept = {id(x) for p in own for x in (p, p.grad) if x is not None}

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device, torch.float32) if id(x) in kept and _is_narrow(y) else y

        super()._apply(moved, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Load; with `assign=True` a checkpoint's tensors become the parameters."""
        for name in DECAY_PARAMETERS:
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor) and _is_narrow(stored):
                state_dict[prefix + name] = stored.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _mark(self) -> None:
        for parameter in map(self._parameters.get, DECAY_PARAMETERS):
            if parameter is not None:
                parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < 4


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay should apply to: matrices and convolution filters.

    Not decayed: `DECAY_PARAMETERS`, norms, biases, embeddings, and an output matrix tied to the embeddings.
    Decides by names and modules, because wrappers and loaders drop marks on tensors.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        and id(parameter) not in embeddings
        and name.rpartition(".")[2] not in (*DECAY_PARAMETERS, "bias")
    ]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A torch optimizer's groups: `decayed_parameters` with weight decay, the others without.

    Parameters that need no gradient are left out.
    """
    decayed = set(decayed_parameters(model))
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0},
    ]  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in decayed]["params"].append(parameter)
    return groups
