"""How many parameters a model has, and where."""

from dataclasses import dataclass
from typing import Any

from gka.models.causal_lm import GKAForCausalLM
from gka.models.decoder import GKAModel


@dataclass(frozen=True)
class ParameterCount:
    """One line of a model's parameter table.

    Attributes:
        part: "embedding", "mixer: gka" (one line a kind of mixer), "mlp", "norms", "output head".
        modules: how many modules of this part there are.
        parameters: numbers in all of them together; those of a tied head are the embedding's.
    """

    part: str
    modules: int
    parameters: int


def count_parameters(model: GKAModel | GKAForCausalLM) -> list[ParameterCount]:
    """The parameters of a `GKAModel` or `GKAForCausalLM` by part; together they are all it has.

    Args:
        model: the model; also on the meta device.
    """
    body = model.model if isinstance(model, GKAForCausalLM) else model
    parts: list[tuple[str, Any]] = [("embedding", body.embed_tokens)]
    for name, layer in zip(body.config.pattern, body.layers, strict=True):
        parts += [(f"mixer: {name}", layer.mixer), ("mlp", layer.mlp)]
        parts += [("norms", layer.input_layernorm), ("norms", layer.post_attention_layernorm)]
    parts.append(("norms", body.norm))
    if isinstance(model, GKAForCausalLM):
        parts.append(("output head", model.lm_head))
    seen: set[int] = set()
    table: dict[str, list[int]] = {}
    for part, module in parts:
        new = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in new}
        table.setdefault(part, []).append(sum(p.numel() for p in new))
    return [ParameterCount(part, len(counts), sum(counts)) for part, counts in table.items()]
