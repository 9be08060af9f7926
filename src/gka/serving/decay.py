"""How much a text fades what came before it: the log decay of every layer, summed over the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gka.layers.padding import Padding
from gka.layers.recurrent import RecurrentMixer


class DecayTotals:
    """Sums of g_t over the tokens that a model reads while it is watched.

    Costs one small product a layer (the decay's own projection a second time), and nothing unless used.

    Attributes:
        totals: by layer index, float64 [B,H]; layers without a decay are not in it.
    """

    def __init__(self, totals: dict[int, Tensor] | None = None):
        self.totals: dict[int, Tensor] = dict(totals or {})

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add up what `model` reads in the `with` block."""
        mixers = [x for x in model.modules() if isinstance(x, RecurrentMixer)]
        hooks = [
            mixer.register_forward_pre_hook(self._add, with_kwargs=True)
            for mixer in mixers
            if mixer.use_forgetting_gate
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _add(self, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        padding = Padding.of(kwargs.get("attention_mask"), x.shape[1])
        g = mixer.gates(x if padding is None else padding.align(x), padding).g
        total = g.double().sum(1)
        before = self.totals.get(mixer.layer_idx)
        self.totals[mixer.layer_idx] = total if before is None else before + total

    def copy(self) -> "DecayTotals":
        """An independent copy; sums are replaced, never changed in place."""
        return DecayTotals(self.totals)
