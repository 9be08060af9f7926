"""The decay's parameters of a recurrent mixer: kept in float32 and out of weight decay, whatever is done
to the model around them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAY_PARAMETERS = ("A_log", "dt_bias")
"""Of the decay exp(A_log) softplus(. + dt_bias). It acts at every token, so that a half-precision rounding
of these few numbers compounds over the sequence, and weight decay would change how long is remembered."""

MOST_DECAY = 1e30  # exp of minus that is 0, and its products with a gradient are finite
MOST_LOG_RATE = 60.0  # e^60 times a gradient is finite, and g = -1e-12 needs no subnormal softplus


class DecayParameters(nn.Module):
    """A module that holds `DECAY_PARAMETERS` itself.

    They are float32 or wider: `.to(dtype)`, `.half()`, `.bfloat16()`, a default dtype and
    `load_state_dict(assign=True)` leave them so, without a rounding on the way. They carry
    `_no_weight_decay = True`, also in a copy, after `to_empty` and where a loader puts new ones in.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def log_decay(self, a: Tensor) -> Tensor:
        """g = -exp(A_log) softplus(a + dt_bias) of a [B,T,H], finite: inf times 0 would be NaN.

        What A_log has above MOST_LOG_RATE goes into the softplus, e^s softplus(x) = softplus(x + s) for
        x + s << 0. Where that does not hold both forms are a decay of 0.
        """
        A_log = self.A_log.to(a.dtype)
        # a clamp of its own, and not A_log less the other: no rounding reaches an ordinary gradient
        shift = self.dt_bias.to(a.dtype) + F.relu(A_log - MOST_LOG_RATE)
        rate = A_log.clamp_max(MOST_LOG_RATE).exp()
        return -(rate * F.softplus(a + shift)).clamp_max(MOST_DECAY)

    def _add_decay_parameters(self, heads: int) -> None:
        """A_log and dt_bias [heads], without values."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name in DECAY_PARAMETERS:
            setattr(self, name, nn.Parameter(torch.empty(heads, dtype=dtype)))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, which also assigns parameters through it."""
        super().register_parameter(name, param)
        if name in DECAY_PARAMETERS:
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle: tensors lose their marks there."""
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to`, `.half`, `.cuda` and `to_empty` come to."""
        own = [p for p in map(self._parameters.get, DECAY_PARAMETERS) if p is not None]
        kept = {id(x) for p in own for x in (p, p.grad) if x is not None}

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device, torch.float32) if id(x) in kept and _is_narrow(y) else y

        super()._apply(moved, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """With `assign=True` a checkpoint's tensors become the parameters."""
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

    Not decayed: `DECAY_PARAMETERS`, norms, biases and embeddings; nor an output matrix that is tied to the
    embeddings. Goes by names and modules, so that wrappers and loaders, which drop marks on tensors, do not
    matter.
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
