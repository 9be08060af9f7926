"""What a session knows: the model's states after some tokens and what is needed to go on from them, and
whether named tensors are that: all that a state file may be forged in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gka.layers.parts.surround import Gates
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models import GKACache, GKAForCausalLM, cache_tensors, fill_cache, state_shapes

_MOST = 2**40  # tokens and rows; beyond, products of sizes leave the range of 64 bits
_HALF = {torch.bfloat16, torch.float16}


class DecayTotals:
    """How much a text fades what came before it: sums of the log decays g_t over the tokens that
    are read into a cache while it is watched.

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


@dataclass
class Contents:
    """The states after `tokens` positions.

    Attributes:
        cache: the states of all layers.
        tokens: positions read, padding included.
        logits: [B,V] after the last position; None where they are not known.
        mask: [B,tokens], False at padding; None without padding, or where no layer would ask.
        decay: total log decays; None where they are not tracked.
    """

    cache: GKACache
    tokens: int = 0
    logits: Tensor | None = None
    mask: Tensor | None = None
    decay: DecayTotals | None = field(default=None)

    @classmethod
    def empty(cls, model: GKAForCausalLM, track_decay: bool) -> "Contents":
        """Of a session that has read nothing."""
        return cls(GKACache(model.config), decay=DecayTotals() if track_decay else None)

    @property
    def batch_size(self) -> int | None:
        """Rows; None before the first token."""
        held = next(iter(cache_tensors(self.cache).values()), None)
        return None if held is None else held.shape[0]

    def copy(self, repeats: int = 1) -> "Contents":
        """An independent copy, each row `repeats` times."""
        cache = self.cache.clone()
        decay = None if self.decay is None else self.decay.copy()
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        if decay is not None and repeats > 1:
            decay.totals = {i: x.repeat_interleave(repeats, 0) for i, x in decay.totals.items()}
        logits, mask = (
            None if x is None else x.repeat_interleave(repeats, 0) for x in (self.logits, self.mask)
        )
        return Contents(cache, self.tokens, logits, mask, decay)

    def named(self) -> dict[str, Tensor]:
        """All tensors by name: those of `cache_tensors`, `logits`, `mask` and `log_decay.I`."""
        tensors = cache_tensors(self.cache)
        if self.logits is not None:
            tensors["logits"] = self.logits
        if self.mask is not None:
            tensors["mask"] = self.mask
        if self.decay is not None:
            tensors |= {f"log_decay.{index}": x for index, x in self.decay.totals.items()}
        return tensors

    @classmethod
    def of_named(
        cls, model: GKAForCausalLM, tensors: dict[str, Tensor], tokens: int, tracked: bool
    ) -> "Contents":
        """The inverse of `named`; the tensors, which fit the model, are taken over, not copied."""
        tensors = dict(tensors)
        logits, mask = tensors.pop("logits", None), tensors.pop("mask", None)
        names = [name for name in tensors if name.startswith("log_decay.")]
        totals = {int(name.partition(".")[2]): tensors.pop(name) for name in names}
        cache = fill_cache(GKACache(model.config), tensors, tokens)
        return cls(cache, tokens, logits, mask, DecayTotals(totals) if tracked else None)


def why_not(
    model: GKAForCausalLM, header: dict[str, Any], tensors: dict[str, Tensor]
) -> str | None:
    """Why they cannot be the states of `model`; None if they can. No number is looked at.

    Args:
        model: whose states they are said to be.
        header: with `tokens`, `batch_size` (0 before the first token) and `tracks_decay`.
        tensors: named as by `Contents.named`.
    """
    for name in ("tokens", "batch_size"):
        count = header.get(name)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < _MOST:
            return f"{name} is {count!r:.40}; expected a whole number from 0 on"
    tokens, rows, tracked = header["tokens"], header["batch_size"], header.get("tracks_decay")
    if not isinstance(tracked, bool):
        return f"tracks_decay is {tracked!r:.40}; expected true or false"
    if (tokens == 0) != (rows == 0):
        return f"{tokens} tokens in {rows} rows"
    needed, optional = _shapes(model, rows, tokens, tracked)
    missing = [name for name in needed if name not in tensors]
    if missing:
        return f"it needs {_some(missing)}, which the file lacks"
    surplus = [name for name in tensors if name not in needed and name not in optional]
    if surplus:
        return f"it has no place for {_some(surplus)}"
    for name, x in tensors.items():
        shape, dtypes = (needed | optional)[name], _dtypes(name, model.dtype)
        if tuple(x.shape) != shape:
            return f"{name} has shape {tuple(x.shape)}; expected {shape}"
        if x.dtype not in dtypes:
            shown = " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            return f"{name} is {str(x.dtype).removeprefix('torch.')}; expected {shown}"
    return None


def why_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Which tensor holds NaN or infinity; None if none does."""
    for name, x in tensors.items():
        if not bool(x.isfinite().all()):
            return f"{name} holds numbers that are not finite"
    return None


def _shapes(
    model: GKAForCausalLM, rows: int, tokens: int, tracked: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of what must be there, and of what may."""
    if tokens == 0:
        return {}, {}
    needed, optional = (
        state_shapes(model, rows, tokens),
        {"logits": (rows, model.config.vocab_size)},
    )
    mixers = [layer.mixer for layer in model.model.layers]
    if not all(isinstance(mixer, RecurrentMixer) for mixer in mixers):
        optional["mask"] = (rows, tokens)
    for index, mixer in enumerate(mixers):
        if tracked and isinstance(mixer, RecurrentMixer) and mixer.use_forgetting_gate:
            needed[f"log_decay.{index}"] = (rows, mixer.num_expanded_heads)
    return needed, optional


def _dtypes(name: str, dtype: torch.dtype) -> set[torch.dtype]:
    """Recurrent states are float32 or better; the others have the model's dtype, or autocast's."""
    if name == "mask":
        return {torch.bool}
    if name.startswith("log_decay."):
        return {torch.float64}
    if ".recurrent." in name:
        return {torch.float64 if dtype == torch.float64 else torch.float32}
    return {dtype} if dtype in _HALF else {dtype} | _HALF


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name:.40}" for name in sorted(names)[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
