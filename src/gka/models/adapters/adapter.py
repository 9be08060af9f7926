"""What a foreign format is: two tables of names, and its configuration in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gka.models.configuration import GKAConfig

Names = Mapping[str, str]
_LAYER = "model.layers."


@dataclass(frozen=True)
class Adapter:
    """One foreign format. All names are prefixes of state-dict keys, ours first, theirs second.

    Attributes:
        name: the format's, as `gka convert --to` takes it.
        fields: their configuration as fields of `GKAConfig`; raises `InputError` for what cannot be said.
        config: the inverse, a dictionary for config.json.
        mixers: by mixer, their name of the module and the names within it that differ.
        top: names outside the layers that differ.
        block: names within a layer that differ, mixers apart.
        unused: patterns of keys that their checkpoints may hold and nothing reads.
    """

    name: str
    fields: Callable[[dict[str, Any]], dict[str, Any]]
    config: Callable[[GKAConfig], dict[str, Any]]
    mixers: Mapping[str, tuple[str, Names]]
    top: Names = field(default_factory=dict)
    block: Names = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def prefixes(self, pattern: list[str]) -> list[tuple[str, str]]:
        """Every pair (our prefix, theirs) that differs in a model of this pattern; the longer ones first."""
        pairs = list(self.top.items())
        for layer, mixer in enumerate(pattern):
            at = f"{_LAYER}{layer}."
            module, within = self.mixers[mixer]
            pairs += [(f"{at}mixer.{o}", f"{at}{module}.{t}") for o, t in within.items()]
            pairs += [(f"{at}{o}", f"{at}{t}") for o, t in self.block.items()]
            pairs.append((f"{at}mixer.", f"{at}{module}."))
        return sorted(pairs, key=lambda pair: -len(pair[0]))

    def key_mapping(self, pattern: list[str]) -> dict[str, str]:
        """Their names to ours, as `from_pretrained(key_mapping=)` takes them: patterns and replacements."""
        pairs = sorted(self.prefixes(pattern), key=lambda pair: -len(pair[1]))
        return {f"^{re.escape(theirs)}": ours for ours, theirs in pairs}

    def export(
        self, config: GKAConfig, state: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Our state dict under their names, experts one by one, a tied head left out."""
        pairs = self.prefixes(config.pattern)
        for name, tensor in state.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            for ours, theirs in pairs:
                if name.startswith(ours):
                    name = theirs + name.removeprefix(ours)
                    break
            yield from _each_expert(name, tensor)


def _each_expert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """transformers stacks experts in memory and stores them apart."""
    stem, _, part = name.rpartition(".experts.")
    if part not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for index, expert in enumerate(tensor):
        at = f"{stem}.experts.{index}."
        if part == "down_proj":
            yield at + "down_proj.weight", expert.clone()  # a file holds whole tensors, not views
        else:
            gate, up = expert.chunk(2)
            yield at + "gate_proj.weight", gate.clone()
            yield at + "up_proj.weight", up.clone()
