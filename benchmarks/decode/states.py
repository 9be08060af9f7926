"""What the steps of `benchmarks.decode` run on: states and next tokens of layers, here artificial ones."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.maths.adaptive import solver_steps
from gka.maths.system import System

HISTORY = 512
GRAPH_BYTES, MOST_LAYERS = 1 << 29, 24
MOVING = 1e-3  # the write gate of the steps that are timed


@dataclass(frozen=True)
class Shape:
    """Query heads, key and value heads, K and V."""

    heads: int
    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, layer: "Layer") -> "Shape":
        """The shape of a layer's token."""
        q, k, v = (layer.token[name] for name in "qkv")
        assert q is not None and k is not None and v is not None
        return cls(q.shape[2], k.shape[2], v.shape[2], k.shape[3], v.shape[3])

    def __str__(self) -> str:
        grouped = {self.heads, self.k_heads, self.v_heads} != {self.heads}
        shared = f" ({self.k_heads} of keys, {self.v_heads} of values)" if grouped else ""
        dims = f"K = V = {self.key_dim}"
        if self.key_dim != self.value_dim:
            dims = f"K = {self.key_dim}, V = {self.value_dim}"
        return f"{self.heads} heads{shared}, {dims}"


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's states and the token that comes next, for B sequences.

    Attributes:
        state: H [B,H,K,K] and U [B,H,K,V], float32.
        token: q, k, v [B,1,heads,D], g, gk, alpha and beta [B,1,H], as the op takes them.
        settings: scale and ridge_ratio, as the op takes them.
    """

    state: tuple[Tensor, Tensor]
    token: dict[str, Tensor | None]
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> "Layer":
        h, u = (x[rows] for x in self.state)
        token = {name: None if x is None else x[rows] for name, x in self.token.items()}
        return Layer((h, u), token, self.settings).tied(self)

    def tied(self, other: "Layer") -> "Layer":
        """With one tensor as g and gk if the other has it: so the op knows that one decay serves both."""
        one = self.token["g"] is not None and other.token["gk"] is other.token["g"]
        return replace(self, token=self.token | {"gk": self.token["g"]}) if one else self

    def still(self) -> dict[str, Tensor | None]:
        """The token, written with a gate of MOVING and without decay: the work is the same, and the states
        stay as they are."""
        like = self.state[0]
        zero = like.new_zeros(like.shape[0], 1, like.shape[1])
        decays = {name: zero for name in ("g", "gk") if self.token[name] is not None}
        return self.token | decays | {"beta": zero + MOVING}

    def steps(self, num_iter: int) -> Tensor:
        """Steps that the adaptive solver takes at these states in the torch form, int64 [B,H]."""
        ridge_ratio = self.settings.get("ridge_ratio", 0.02)
        return solver_steps(System.of_state(self.state[0]), ridge_ratio, num_iter)


class Source(Protocol):
    """Layers to step.

    Attributes:
        name: in results.
        shape: of all its layers.
        about: what results say of it.
    """

    name: str
    shape: Shape
    about: dict[str, Any]

    def layers(self, batch: int) -> list[Layer]:
        """Those of the graph; one that is there twice is stepped twice, on a copy of its states each."""
        ...


def unit_keys(*shape: int, device: str) -> Tensor:
    return normalize(silu(torch.randn(*shape, device=device) + 0.5), dim=-1)


class Artificial:
    """HISTORY tokens of unit SiLU keys with a mean under decays of exp(-1e-3) to exp(-1e-1), by head.

    Args:
        shape: of the layers.
        device: of the tensors.
        count: layers. None: of GRAPH_BYTES together, MOST_LAYERS at most.
    """

    name = "artificial"

    def __init__(self, shape: Shape, device: str, count: int | None) -> None:
        self.shape, self.device, self.count = shape, device, count
        self.about: dict[str, Any] = {}

    def layers(self, batch: int) -> list[Layer]:
        """One layer with gates that decay and write, as often as the graph has it."""
        state = self.states(batch)
        size = sum(x.nbytes for x in state)
        count = self.count or max(1, min(MOST_LAYERS, math.ceil(GRAPH_BYTES / size)))
        return [Layer(state, self.token(batch))] * count

    def states(self, batch: int) -> tuple[Tensor, Tensor]:
        """H and U."""
        s, device = self.shape, self.device
        h, u = (
            torch.empty(batch, s.heads, s.key_dim, width, device=device)
            for width in (s.key_dim, s.value_dim)
        )
        rate = torch.logspace(-3, -1, s.heads, device=device)
        weight = torch.exp(-rate[:, None] * torch.arange(HISTORY, device=device)).unsqueeze(-1)
        for b in range(batch):
            k = unit_keys(s.heads, HISTORY, s.key_dim, device=device)
            v = torch.randn(s.heads, HISTORY, s.value_dim, device=device)
            h[b], u[b] = (k * weight).mT @ k, (k * weight).mT @ v
        return (h + h.mT) / 2, u

    def token(self, batch: int) -> dict[str, Tensor | None]:
        s, device = self.shape, self.device
        q = unit_keys(batch, 1, s.heads, s.key_dim, device=device).bfloat16()
        k = unit_keys(batch, 1, s.k_heads, s.key_dim, device=device).bfloat16()
        v = torch.randn(batch, 1, s.v_heads, s.value_dim, device=device).bfloat16()
        zero = torch.zeros(batch, 1, s.heads, device=device)
        gates = {"g": zero - 0.05, "gk": zero - 0.1, "alpha": torch.rand_like(zero)}
        return {"q": q, "k": k, "v": v, **gates, "beta": zero + 0.9}
