"""Contents of a session: the model's states and all else that continuing needs; and their combination."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.layers.linear_attention import GatedLinearAttention
from gka.layers.parts.surround import Gates
from gka.maths.moments import after
from gka.models import GKACache, GKAForCausalLM, cache_tensors, fill_cache


class DecayTotals:
    """Sums of the log decays g_t over the tokens that are read into a cache while `watching` it.

    Attributes:
        totals: layer index to float64 [B,H]; layers without decay are absent.
    """

    def __init__(self, totals: dict[int, Tensor] | None = None):
        self.totals: dict[int, Tensor] = dict(totals or {})

    @contextmanager
    def watching(self, cache: GKACache) -> Iterator[None]:
        """Add the decays of tokens read into `cache`, and no other cache, in the `with` block."""
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
        logits: [B,vocab_size] after the last position; None if unknown.
        mask: bool [B,tokens], False at padding; None without padding or without an attention layer.
        decay: total log decays; None if they are not tracked.
    """

    cache: GKACache
    tokens: int = 0
    logits: Tensor | None = None
    mask: Tensor | None = None
    decay: DecayTotals | None = field(default=None)

    @classmethod
    def empty(cls, model: GKAForCausalLM, track_decay: bool) -> "Contents":
        """The contents of a session that has read nothing."""
        return cls(GKACache(model.config), decay=DecayTotals() if track_decay else None)

    @property
    def batch_size(self) -> int | None:
        """Number of rows B; None before the first token."""
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
        """The inverse of `named`. The tensors must fit the model and are not copied."""
        tensors = dict(tensors)
        logits, mask = tensors.pop("logits", None), tensors.pop("mask", None)
        names = [name for name in tensors if name.startswith("log_decay.")]
        totals = {int(name.partition(".")[2]): tensors.pop(name) for name in names}
        cache = fill_cache(GKACache(model.config), tensors, tokens)
        return cls(cache, tokens, logits, mask, DecayTotals(totals) if tracked else None)


HOW = ("sequence", "sum", "mean")
Named = list[dict[str, Tensor]]


@torch.no_grad()
def combined(model: GKAForCausalLM, parts: Sequence[Contents], how: str) -> Contents:
    """Combine the contents of several sessions; arguments and errors as in `GenerationSession.combine`."""
    _check(parts, how)
    named = [cache_tensors(part.cache) for part in parts]
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        mixer: Any = layer.mixer
        own = [_of_layer(x, index) for x in named]
        if "keys" in own[0]:
            merged = _attention(mixer, own, parts)
        elif isinstance(mixer, GatedKalmaNet | GatedLinearAttention):
            merged = _recurrent(mixer, own, parts, how)
        else:
            raise InputError(
                f"layer {index} is a {type(mixer).__name__}, whose state is no decayed sum of what it "
                "read: only gka, gla and attention layers can be combined"
            )
        tensors |= {f"layers.{index}.{name}": x for name, x in merged.items()}
    tokens = sum(part.tokens for part in parts)
    cache = fill_cache(GKACache(model.config), tensors, tokens)
    return Contents(cache, tokens, None, _mask(parts), _decay(parts) if how == "sequence" else None)


def _check(parts: Sequence[Contents], how: str) -> None:
    if how not in HOW:
        raise InputError(f"how is {how!r}; expected one of {', '.join(HOW)}")
    batches = [part.batch_size for part in parts]
    if None in batches or len(set(batches)) != 1:
        shown = ", ".join("nothing read" if x is None else str(x) for x in batches)
        raise InputError(f"sessions: expected equally many rows in each, got {shown}")
    if how == "sequence" and any(part.decay is None for part in parts[1:]):
        raise InputError(
            "how='sequence' needs the total decays: open the sessions with track_decay=True"
        )


def _of_layer(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"layers.{index}."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def _recurrent(mixer: Any, own: Named, parts: Sequence[Contents], how: str) -> dict[str, Tensor]:
    """Combine the moments by `how`; take the convolutions of the last part."""
    merged = {name: x.clone() for name, x in own[-1].items() if name.startswith("conv.")}
    for name in (name for name in own[0] if name.startswith("recurrent.")):
        fades = not (
            name == "recurrent.0" and getattr(mixer, "use_forgetting_gate_kk", None) is False
        )
        total = own[0][name].clone()
        for state, part in zip(own[1:], parts[1:], strict=True):
            g = None
            if how == "sequence" and fades and part.decay is not None:
                g = part.decay.totals.get(mixer.layer_idx)
            total = after(total, state[name], g)
        merged[name] = total / len(parts) if how == "mean" else total
    return merged


def _attention(mixer: Any, own: Named, parts: Sequence[Contents]) -> dict[str, Tensor]:
    """Concatenate keys, rotated to their new positions, and values; keep what a sliding window needs."""
    keys, values = [own[0]["keys"]], [own[0]["values"]]
    offset = _lengths(parts[0])
    for tensors, part in zip(own[1:], parts[1:], strict=True):
        k = tensors["keys"]
        positions = offset[:, None].to(k.device).expand(-1, k.shape[-2])
        turned = mixer.turn(k.transpose(1, 2), positions).transpose(1, 2)
        keys.append(turned)
        values.append(tensors["values"])
        offset = offset + _lengths(part)
    first = 0 if mixer.window_size is None else -(mixer.window_size - 1)
    return {
        name: torch.cat(x, -2)[..., first:, :] for name, x in (("keys", keys), ("values", values))
    }


def _lengths(part: Contents) -> Tensor:
    """Tokens of each row without padding [B]."""
    if part.mask is not None:
        return part.mask.sum(1)
    return torch.full((part.batch_size or 0,), part.tokens)


def _mask(parts: Sequence[Contents]) -> Tensor | None:
    if all(part.mask is None for part in parts):
        return None
    masks = [part.mask for part in parts]
    device = next(mask.device for mask in masks if mask is not None)
    rows = parts[0].batch_size or 0
    ones = [torch.ones(rows, part.tokens, dtype=torch.bool, device=device) for part in parts]
    return torch.cat([one if x is None else x for x, one in zip(masks, ones, strict=True)], 1)


def _decay(parts: Sequence[Contents]) -> DecayTotals | None:
    """Totals over all parts; None if the first part did not track them."""
    decays = [part.decay for part in parts]
    if decays[0] is None:
        return None
    totals = dict(decays[0].totals)
    for decay in decays[1:]:
        assert decay is not None
        totals = {index: x + decay.totals[index] for index, x in totals.items()}
    return DecayTotals(totals)
