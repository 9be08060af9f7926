"""How much a text fades what came before it: the log decay of every layer, summed over the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gka.layers.parts.surround import Gates
from gka.models import GKACache


class DecayTotals:
    """Sums of g_t over the tokens that are read into a cache while it is watched.

    Attributes:
        totals: by layer index, float64 [B,H]; layers without a decay are not in it.
    """

    def __init__(self, totals: dict[int, Tensor] | None = None):
        self.totals: dict[int, Tensor] = dict(totals or {})

    @contextmanager
    def watching(self, cache: GKACache) -> Iterator[None]:
        """Add up what is read into `cache` in the `with` block, whatever else its model reads meanwhile."""
        layers = range(len(cache.layers))
        with cache.observing(dict.fromkeys(layers, self._add)):
            yield

    @torch.no_grad()
    def _add(self, mixer: Any, q: Tensor, k: Tensor, gates: Gates) -> None:
        if gates.g is None:
            return
        total = gates.g.double().sum(1)
        before = self.totals.get(mixer.layer_idx)
        self.totals[mixer.layer_idx] = total if before is None else before + total

    def copy(self) -> "DecayTotals":
        """An independent copy."""
        return DecayTotals({index: x.clone() for index, x in self.totals.items()})
