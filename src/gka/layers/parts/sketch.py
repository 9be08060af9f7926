"""The map S of a sketched solve in a layer: learned, or fixed."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gka.errors import InputError
from gka.maths.sketch import orthonormal
from gka.ops.dispatch import no_autocast

SketchKind = Literal["learned", "fixed"]


class Sketch(nn.Module):
    """A map S [Hk,K,d] with orthonormal columns for each key head; random at first.

    Only the span of S matters (docs/maths.md, section 12), so a learned one is any `weight`, whose
    orthonormal factor is S: it stays orthonormal whatever an optimizer does. A fixed one is its weight, which
    `load` sets.

    Args:
        heads: key heads Hk.
        head_dim: K.
        dim: d, from 1 to K.
        kind: "learned" or "fixed".

    Attributes:
        weight: [Hk,K,d]. Without gradient if the map is fixed.

    Raises:
        InputError: another kind, or d out of range.
    """

    weight: nn.Parameter

    def __init__(self, heads: int, head_dim: int, dim: int, kind: SketchKind = "learned"):
        super().__init__()
        check_sketch(dim, kind, head_dim)
        self.kind: SketchKind = kind
        self.weight = nn.Parameter(torch.empty(heads, head_dim, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a random span, uniform among all of d dimensions."""
        self.weight.copy_(orthonormal(nn.init.normal_(self.weight)))

    @torch.no_grad()
    def load(self, basis: Tensor) -> None:
        """Set the span to that of `basis` [Hk,K,d], whose columns are made orthonormal.

        Raises:
            InputError: another shape, or columns that are not independent.
        """
        if basis.shape != self.weight.shape:
            raise InputError(
                f"a basis must be [Hk, K, d] = {list(self.weight.shape)}; got {list(basis.shape)}"
            )
        found = orthonormal(basis.double())
        if not bool(found.isfinite().all()):
            raise InputError("a basis must have independent columns in every head")
        self.weight.copy_(found)

    def forward(self) -> Tensor:
        """S [Hk,K,d] in the dtype of the weight."""
        if self.kind == "fixed":
            return self.weight.detach()
        with no_autocast(self.weight.device.type):
            return orthonormal(self.weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as in `nn.Module`, which also assigns loaded parameters through this method."""
        super().register_parameter(name, param)
        if self.kind == "fixed" and param is not None:
            param.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.weight.shape))}, kind={self.kind}"


def check_sketch(dim: int | None, kind: str, head_dim: int) -> None:
    """Raises `InputError` unless dim is None or an int from 1 to head_dim, and kind is known."""
    if kind not in get_args(SketchKind):
        raise InputError(f"sketch: expected one of {', '.join(get_args(SketchKind))}, got {kind!r}")
    if dim is None:
        return
    if not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= head_dim:
        raise InputError(
            f"sketch_dim: expected None or an int from 1 to head_dim = {head_dim}, got {dim!r}"
        )
