"""What a session knows: the model's states after some tokens, and what is needed to go on from them."""

from dataclasses import dataclass, field

from torch import Tensor

from gka.models import GKACache, GKAForCausalLM, cache_tensors, fill_cache
from gka.serving.decay import DecayTotals


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
