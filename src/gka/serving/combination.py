"""Sessions that have read their texts apart, as one: layer by layer, by what a layer keeps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.layers.linear_attention import GatedLinearAttention
from gka.maths.moments import after
from gka.models import GKACache, GKAForCausalLM, cache_tensors, fill_cache
from gka.serving.contents import Contents, DecayTotals

HOW = ("sequence", "sum", "mean")
Named = list[dict[str, Tensor]]


@torch.no_grad()
def combined(model: GKAForCausalLM, parts: Sequence[Contents], how: str) -> Contents:
    """The contents of several sessions as one; see `GenerationSession.combine`.

    Raises:
        InputError: as there.
    """
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
    """Moments combined, convolutions of the last part."""
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
    """Keys turned on by the tokens before their part; of a window, no more than it keeps."""
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
    """Tokens of each row, padding not counted [B]."""
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
    """Totals over all parts; None where the first did not track its own."""
    decays = [part.decay for part in parts]
    if decays[0] is None:
        return None
    totals = dict(decays[0].totals)
    for decay in decays[1:]:
        assert decay is not None
        totals = {index: x + decay.totals[index] for index, x in totals.items()}
    return DecayTotals(totals)
