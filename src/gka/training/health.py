"""Health of a model's Gated KalmaNet layers while it trains, on a few tokens of the current batch.

`gka inspect` measures a finished model in detail and in float64; this is the cheap part of it, for every run.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from gka.layers import GatedKalmaNet
from gka.layers.parts.surround import Gates
from gka.maths.solvers import SOLVERS
from gka.models import GKACache, GKAForCausalLM
from gka.ops import solver_steps
from gka.ops.checks import check_solver

Health = list[dict[str, float]]


def decoder_of(model: nn.Module) -> GKAForCausalLM | None:
    """The language model inside a model, adapters or a loss; None without a Gated KalmaNet layer in it."""
    for module in model.modules():
        if isinstance(module, GKAForCausalLM) and "gka" in module.config.pattern:
            return module
    return None


@torch.no_grad()
def measure_health(model: GKAForCausalLM, tokens: Tensor) -> Health:
    """Read tokens without gradient, uncompiled, and measure each Gated KalmaNet layer.

    Args:
        model: the whole model, as sharded parameters are gathered where it is called; its mode and weights
            are left as they are.
        tokens: ids [1,T] of one text.

    Returns:
        For each layer `layer`, its index, and means over heads: after the last token `norm_h` |H|, `norm_u`
        |U| and `lambda` = a |H|; over the tokens `decay` gamma, `alpha` and `beta` (1 for a gate that the
        layer lacks) and `solver_steps`, those taken.
    """
    cache, seen = GKACache(model.config), cast(dict[int, dict[str, float]], {})

    def look(mixer: GatedKalmaNet, q: Tensor, k: Tensor, gates: Gates) -> None:
        seen[int(mixer.layer_idx or 0)] = _of_tokens(mixer, q, k, gates)

    mixers = {i: layer.mixer for i, layer in enumerate(model.model.layers)}
    ours = {i: m for i, m in mixers.items() if isinstance(m, GatedKalmaNet)}
    training = model.training
    model.eval()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            cache.observing(dict.fromkeys(ours, look)),
        ):
            model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        model.train(training)
    layers = cast(Any, cache.layers)
    return [
        {"layer": i, **_of_states(mixer, layers[i].recurrent_states), **seen[i]}
        for i, mixer in ours.items()
    ]


def _of_states(mixer: GatedKalmaNet, states: dict[int, Tensor]) -> dict[str, float]:
    h, u = (states[i].float().flatten(-2).norm(dim=-1).mean() for i in (0, 1))
    return {"norm_h": float(h), "norm_u": float(u), "lambda": mixer.ridge_ratio * float(h)}


def _of_tokens(mixer: GatedKalmaNet, q: Tensor, k: Tensor, gates: Gates) -> dict[str, float]:
    decay = 1.0 if gates.g is None else float(gates.g.exp().mean())
    rest = {"alpha": gates.alpha, "beta": gates.beta}
    means = {name: 1.0 if gate is None else float(gate.mean()) for name, gate in rest.items()}
    return {"decay": decay, **means, "solver_steps": _steps(mixer, q, k, gates)}


def _steps(mixer: GatedKalmaNet, q: Tensor, k: Tensor, gates: Gates) -> float:
    """Mean number of solver steps."""
    if mixer.num_iter == 0 or not SOLVERS[check_solver(mixer.solver)].adaptive:
        return float(mixer.num_iter)
    q, k = mixer.as_solved(q), mixer.as_solved(k)
    taken = solver_steps(
        k, gates.g if mixer.use_forgetting_gate_kk else None, mixer.ridge_ratio, mixer.num_iter,
        solver=mixer.solver, beta=gates.beta, q=q if mixer.solver == "cg" else None,
        num_heads=mixer.num_expanded_heads, value_dim=mixer.head_v_dim, backend=mixer.backend,
    )  # fmt: skip
    return float(taken.double().mean())
