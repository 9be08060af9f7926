"""What the steps of `benchmarks.decode` run on: states and next tokens of layers, artificial and trained.

A trained model's are those after a text that it has not been trained on.
"""

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
MOVING = 1e-3  # the write gate of the steps that are timed
READ = 16  # sequences at a time
HELD_OUT = 0.01  # of the standard library, as in training unless told otherwise
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
        q = self.token["q"]
        assert q is not None
        system = System.of_state(self.state[0])
        return Adaptive(ridge_ratio, num_iter).steps(system, q.transpose(1, 2).float())


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


class Trained:
    """A model that has read `context` tokens from as many places of a text as there are sequences.

    Args:
        options: `model`, `text`, `context`, `device`, `batches`.

    Raises:
        InputError: the model cannot be loaded or has no such states, or the text is too short.
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
        """The model's own, for the first sequences."""
        return [layer[:batch] for layer in self.read]


def text_ids(tokenizer: Any, text: list[Path]) -> Tensor:
    """Ids of the files and folders given, or of the held-out documents of the standard library."""
    from gka.data import find_documents, pack, split

    packed = pack(find_documents([str(path) for path in text]), tokenizer)
    ranges = [(0, len(packed.tokens))] if text else split(packed, HELD_OUT)[1].ranges
    parts = [torch.from_numpy(packed.tokens[low:high].astype("int64")) for low, high in ranges]
    return torch.cat(parts)


def places(ids: Tensor, count: int, length: int) -> tuple[Tensor, int]:
    """`count` sequences of `length` ids [count,length] from evenly spaced places, and their distance.

    Raises:
        InputError: there are fewer places than sequences.
    """
    apart = (len(ids) - length) // max(1, count - 1)
    if len(ids) < length or (apart < 1 and count > 1):
        raise InputError(
            f"the text has {len(ids)} tokens, too few for {count} sequences of {length}: give more text "
            "(--text), a shorter --context or smaller --batches"
        )
    return torch.stack([ids[i * apart : i * apart + length] for i in range(count)]), apart


def next_tokens(model: Any, rows: Tensor, count: int) -> list[Layer]:
    """States and tokens of the `count` GKA layers where each reads the last id of the rows [B,T].

    Raises:
        InputError: a layer does not step on states in place.
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
    """What the layers give the op of decoding inside, call by call: its own inputs, the states copied."""
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
    """Sequences of several reads of one layer, one after the other."""
    h, u = (torch.cat(states) for states in zip(*(part.state for part in parts), strict=True))
    token: dict[str, Tensor | None] = {}
    for name in parts[0].token:
        given = [x for x in (part.token[name] for part in parts) if x is not None]
        token[name] = torch.cat(given) if given else None
    return Layer((h, u), token, parts[0].settings).tied(parts[0])
