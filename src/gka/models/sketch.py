"""Sketch a trained model: bases measured from the spectrum of its H_t, and the model that solves in them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.layers.parts.surround import Gates
from gka.maths.sketch import spectral_basis
from gka.models.cache import GKACache
from gka.models.causal_lm import GKAForCausalLM
from gka.ops import end_state

EVERY = 64
"""H_t is looked at after every so many tokens, and after the last one."""


@torch.no_grad()
def measure_moments(model: GKAForCausalLM, tokens: Tensor) -> dict[int, Tensor]:
    """The mean of H_t / |H_t|_F over texts and positions, for each Gated KalmaNet layer and key head.

    Query heads that share a key head share its basis, and all enter the mean. Texts count alike, whatever
    their decay and write gates make of |H_t|, because the solve does not depend on it.

    Args:
        model: a model with Gated KalmaNet layers, sketched or not.
        tokens: ids [N,T] of N texts, each read from an empty memory.

    Returns:
        [Hk,K,K] float64 by the layer's index.

    Raises:
        InputError: no such layer, or no tokens.
    """
    mixers = {i: layer.mixer for i, layer in enumerate(model.model.layers)}
    ours: dict[int, Any] = {i: m for i, m in mixers.items() if isinstance(m, GatedKalmaNet)}
    if not ours:
        raise InputError("the model has no Gated KalmaNet layer to sketch")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise InputError(f"tokens: expected ids [N,T], got shape {tuple(tokens.shape)}")
    found: dict[int, Tensor] = {}

    def look(mixer: GatedKalmaNet, q: Tensor, k: Tensor, gates: Gates) -> None:
        found[int(mixer.layer_idx or 0)] = _mean_moment(mixer, q, k, gates)

    cache = GKACache(model.config)
    training = model.training
    model.eval()
    try:
        with cache.observing(dict.fromkeys(ours, look)):
            model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        model.train(training)
    return found


def _mean_moment(mixer: GatedKalmaNet, q: Tensor, k: Tensor, gates: Gates) -> Tensor:
    """Mean of H_t / |H_t| by key head [Hk,K,K], from q [N,T,H,K] and k [N,T,Hk,K]."""
    heads, shared = q.shape[2], k.shape[2]
    fades = gates.g if mixer.use_forgetting_gate_kk else None
    wide, gate, beta = (None if x is None else x.double() for x in (k, fades, gates.beta))
    assert wide is not None
    read = end_state(
        wide, wide[..., :1], gate, gate, beta, num_heads=heads, return_starts=True, chunk_size=EVERY,
        backend="torch",
    )  # fmt: skip
    assert read.starts is not None
    every = torch.cat([read.starts[0], read.h_kk])
    norms = every.square().sum((-2, -1)).sqrt()[..., None, None]
    unit = torch.where(norms > 0, every / norms, 0.0)
    total = unit.unflatten(1, (shared, heads // shared)).sum((0, 2))
    return total / (norms > 0).sum((0, 2, 3)).unflatten(0, (shared, -1)).sum(1)[:, None, None]


def measure_bases(model: GKAForCausalLM, tokens: Tensor, dim: int) -> dict[int, Tensor]:
    """The d leading eigenvectors of `measure_moments` [Hk,K,d], by layer: S for `sketched`."""
    return {i: spectral_basis(h, dim) for i, h in measure_moments(model, tokens).items()}


def sketched(
    model: GKAForCausalLM,
    dim: int,
    bases: Mapping[int, Tensor] | None = None,
    *,
    kind: str = "fixed",
) -> GKAForCausalLM:
    """A copy of `model` whose Gated KalmaNet layers solve in `dim` dimensions, all other weights unchanged.

    Args:
        model: a model with Gated KalmaNet layers. If it is sketched already, its maps are replaced.
        dim: d, from 1 to the layers' K.
        bases: S [Hk,K,d] by layer index (`measure_bases`). None: random ones.
        kind: "fixed", or "learned" to train the maps from there.

    Returns:
        The copy, in the same dtype and mode and on the same device.

    Raises:
        InputError: no such layer, d out of range, or bases that do not fit.
    """
    if "gka" not in model.config.pattern:
        raise InputError("the model has no Gated KalmaNet layer to sketch")
    config = copy.deepcopy(model.config)
    config.sketch_dim, config.sketch = dim, kind
    like = next(model.parameters())
    made: Any = GKAForCausalLM(config)
    made = made.to(device=like.device, dtype=model.dtype)
    weights = {n: x for n, x in model.state_dict().items() if ".sketch_map." not in n}
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert not unexpected and all(".sketch_map." in name for name in missing)
    for index, basis in (bases or {}).items():
        mixer = made.model.layers[index].mixer if index < len(made.model.layers) else None
        if not isinstance(mixer, GatedKalmaNet):
            raise InputError(f"bases: layer {index} is no Gated KalmaNet layer")
        mixer.sketch_map.load(basis.to(like.device))
    if model.config.tie_word_embeddings:
        made.tie_weights()
    return made.train(model.training)


@torch.no_grad()
def fix_sketch(model: GKAForCausalLM) -> GKAForCausalLM:
    """A copy whose learned maps are stored as they are used, "fixed": a call computes none of them."""
    mixers = {i: layer.mixer for i, layer in enumerate(model.model.layers)}
    maps = {
        i: m.sketch_map()
        for i, m in mixers.items()
        if isinstance(m, GatedKalmaNet) and m.sketch_dim is not None
    }
    if not maps:
        raise InputError("the model has no sketched layer")
    return sketched(model, int(model.config.sketch_dim or 0), maps)
