"""Inputs of the decode benchmark: states and next tokens of layers, artificial or of a trained model."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from benchmarks.results import name_of
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.errors import InputError
from gka.layers import gated_kalmanet
from gka.maths.ridge import System
from gka.maths.solvers import Adaptive

HISTORY = 512
GRAPH_BYTES, MOST_LAYERS = 1 << 29, 24
MOVING = 1e-3  # write gate of the timed steps
READ = 16  # sequences that a model reads at a time
HELD_OUT = 0.01  # held-out fraction of the standard library, as by default in training
TOKEN = ("q", "k", "v", "g", "gk", "alpha")


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
    """A layer's states and next token, for B sequences.

    Attributes:
        state: H [B,H,K,K] and U [B,H,K,V], float32.
        token: the op's arguments q, k, v [B,1,heads,D], and g, gk, alpha, beta [B,1,H].
        settings: the op's scale and ridge_ratio; empty for its defaults.
    """

    state: tuple[Tensor, Tensor]
    token: dict[str, Tensor | None]
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> "Layer":
        h, u = (x[rows] for x in self.state)
        token = {name: None if x is None else x[rows] for name, x in self.token.items()}
        return Layer((h, u), token, self.settings).tied(self)

    def tied(self, other: "Layer") -> "Layer":
        """The layer with one tensor for g and gk if `other` has one, so that the op sees tied decays."""
        one = self.token["g"] is not None and other.token["gk"] is other.token["g"]
        return replace(self, token=self.token | {"gk": self.token["g"]}) if one else self

    def still(self) -> dict[str, Tensor | None]:
        """The token with write gate MOVING and no decay: the same work, and the states hardly change."""
        like = self.state[0]
        zero = like.new_zeros(like.shape[0], 1, like.shape[1])
        decays = {name: zero for name in ("g", "gk") if self.token[name] is not None}
        return self.token | decays | {"beta": zero + MOVING}

    def steps(self, num_iter: int) -> Tensor:
        """Steps of the torch backend's adaptive solver at these states, int64 [B,H]."""
        ridge_ratio = self.settings.get("ridge_ratio", 0.02)
        q = self.token["q"]
        assert q is not None
        system = System.of_state(self.state[0])
        return Adaptive(ridge_ratio, num_iter).steps(system, q.transpose(1, 2).float())


class Source(Protocol):
    """A source of layers.

    Attributes:
        name: name in results.
        shape: shape of all layers.
        about: facts for results.
    """

    name: str
    shape: Shape
    about: dict[str, Any]

    def layers(self, batch: int) -> list[Layer]:
        """The layers of a graph; each entry gets its own copy of the states, also if a layer is repeated."""
        ...


def unit_keys(*shape: int, device: str) -> Tensor:
    return normalize(silu(torch.randn(*shape, device=device) + 0.5), dim=-1)


class Artificial:
    """States after HISTORY unit SiLU keys with a mean, and decays of exp(-1e-3) to exp(-1e-1) by head.

    Args:
        shape: shape of the layers.
        device: device of the tensors.
        count: number of layers. None: as many as have GRAPH_BYTES of states, at most MOST_LAYERS.
    """

    name = "artificial"

    def __init__(self, shape: Shape, device: str, count: int | None) -> None:
        self.shape, self.device, self.count = shape, device, count
        self.about: dict[str, Any] = {}

    def layers(self, batch: int) -> list[Layer]:
        """One layer with decay and write gates, repeated for all layers of the graph."""
        state = self.states(batch)
        size = sum(x.nbytes for x in state)
        count = self.count or max(1, min(MOST_LAYERS, math.ceil(GRAPH_BYTES / size)))
        return [Layer(state, self.token(batch))] * count

    def states(self, batch: int) -> tuple[Tensor, Tensor]:
        """H [B,H,K,K] and U [B,H,K,V], float32."""
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


class Trained:
    """A model that has read `context` tokens per sequence, from evenly spaced places of a text.

    Args:
        options: `model`, `text`, `context`, `device`, `batches`.

    Raises:
        InputError: the model cannot be loaded or has no GKA layer that solves, or the text is too short.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from gka.checkpoints.open import load_gka, load_tokenizer_of
        from gka.models.solver import gka_layers
        from gka.serving.tokens import check_model

        self.name = name_of(options.model)
        model: Any = load_gka(options.model, dtype="bfloat16", device=options.device)
        check_model(model)
        mixers = gka_layers(model)
        if not mixers or mixers[0].num_iter == 0:
            raise InputError(f"model {options.model} has no GKA layer that solves (num_iter > 0)")
        ids = text_ids(load_tokenizer_of(options.model), options.text)
        rows, apart = places(ids, max(options.batches), options.context + 1)
        self.read = next_tokens(model, rows.to(options.device), len(mixers))
        self.shape = Shape.of(self.read[0])
        self.about: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": model.config.num_hidden_layers, "gka_layers": len(mixers),
            "text": ", ".join(p.name for p in options.text) or "standard library, held-out part",
            "context": options.context, "tokens_apart": apart,
            "solver": mixers[0].solver, "num_iter": mixers[0].num_iter,
            "ridge_ratio": mixers[0].ridge_ratio,
        }  # fmt: skip

    def layers(self, batch: int) -> list[Layer]:
        """The model's layers, for the first `batch` sequences."""
        return [layer[:batch] for layer in self.read]


def text_ids(tokenizer: Any, text: list[Path]) -> Tensor:
    """Ids of the given files and folders, or of the held-out documents of the standard library."""
    from gka.data import find_documents, pack, split

    packed = pack(find_documents([str(path) for path in text]), tokenizer)
    ranges = [(0, len(packed.tokens))] if text else split(packed, HELD_OUT)[1].ranges
    parts = [torch.from_numpy(packed.tokens[low:high].astype("int64")) for low, high in ranges]
    return torch.cat(parts)


def places(ids: Tensor, count: int, length: int) -> tuple[Tensor, int]:
    """`count` sequences of `length` ids [count,length] from evenly spaced places, and their distance.

    Raises:
        InputError: the text is too short.
    """
    apart = (len(ids) - length) // max(1, count - 1)
    if len(ids) < length or (apart < 1 and count > 1):
        raise InputError(
            f"the text has {len(ids)} tokens, too few for {count} sequences of {length}: give more text "
            "(--text), a shorter --context or smaller --batches"
        )
    return torch.stack([ids[i * apart : i * apart + length] for i in range(count)]), apart


def next_tokens(model: Any, rows: Tensor, count: int) -> list[Layer]:
    """States before the last id of the rows [B,T], and that id's token, for the `count` GKA layers.

    Raises:
        InputError: a layer does not update its states in place, or layers differ in shape.
    """
    from gka.models import GKACache
    from gka.serving.tokens import prefill

    found: list[list[Layer]] = []
    for part in rows.split(READ):
        cache = GKACache(model.config)
        prefill(model, part[:, :-1], cache)
        with watched() as seen:
            prefill(model, part[:, -1:], cache)
        if len(seen) != count:
            raise InputError(
                f"{len(seen)} of {count} GKA layers stepped on states in place; layers with "
                'backend="reference" do not'
            )
        found.append(seen)
    layers = [joined(list(parts)) for parts in zip(*found, strict=True)]
    if len({Shape.of(layer) for layer in layers}) > 1:
        raise InputError("the model's GKA layers differ in their heads or sizes; expected one size")
    return layers


@contextmanager
def watched() -> Iterator[list[Layer]]:
    """List the arguments of the decode op in the block, call by call, with copies of the states."""
    seen: list[Layer] = []
    op = gated_kalmanet.fused_recurrent_gka_

    def watching(*given: Any, state: tuple[Tensor, Tensor], beta: Tensor | None, **rest: Any):
        *inputs, scale, ridge_ratio, _ = given
        h, u = (x.float().clone() for x in state)
        token = dict(zip(TOKEN, inputs, strict=True)) | {"beta": beta}
        seen.append(Layer((h, u), token, {"scale": scale, "ridge_ratio": ridge_ratio}))
        return op(*given, state=state, beta=beta, **rest)

    with mock.patch.object(gated_kalmanet, "fused_recurrent_gka_", watching):
        yield seen


def joined(parts: list[Layer]) -> Layer:
    """Concatenate the sequences of several reads of one layer."""
    h, u = (torch.cat(states) for states in zip(*(part.state for part in parts), strict=True))
    token: dict[str, Tensor | None] = {}
    for name in parts[0].token:
        given = [x for x in (part.token[name] for part in parts) if x is not None]
        token[name] = torch.cat(given) if given else None
    return Layer((h, u), token, parts[0].settings).tied(parts[0])
