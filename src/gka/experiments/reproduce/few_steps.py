"""Why few steps fail in training: gradients before the first step, and the two paths through the keys.

A key enters o_t through H_t and through U_t, and with an exact solve both paths nearly cancel. The library's
gradient through H is that of the exact solve. At few steps it no longer cancels what the shortened solve
sends through U, and the rest grows from layer to layer.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gka.experiments.reproduce.ablation_models import AblatedMixer, Ridge, Variant
from gka.experiments.reproduce.differentiation import (
    CHUNK,
    chebyshev_on,
    implicitly,
    plain_system,
)
from gka.experiments.reproduce.experiment import finite
from gka.layers import RMSNorm
from gka.layers.parts.surround import Gates, MixCall
from gka.ops import chunk_simple_gla

FEW = (1, 2, 3, 4, 5, 6, 8, 12, 30)
PATHS = (2, 3, 8, 30)
KINDS = ("implicit", "iteration")


def gradient_norm(model: Any, ids: Tensor) -> float:
    """Norm of all weights' gradients of the model's loss on ids [B,T]."""
    model(input_ids=ids, labels=ids).loss.backward()
    parts = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(parts).norm().item()


class WatchedMixer(AblatedMixer):
    """A mixer that keeps the inputs of its memory."""

    given: tuple[Tensor, Tensor, Tensor, Gates]

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, call: MixCall
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.given = q, k, v, gates
        return super().mix(q, k, v, gates, call)


@torch.no_grad()
def memory_inputs(model: Any, ids: Tensor) -> list[tuple[Tensor, ...]]:
    """(q, k, v, g, alpha, beta) of every layer in float64, for ids [B,T]."""
    mixers: list[Any] = [
        WatchedMixer.of(block.mixer, Variant("", ridge=Ridge())) for block in model.model.layers
    ]
    model(input_ids=ids)
    found = []
    for mixer in mixers:
        q, k, v, gates = mixer.given
        found.append(tuple(x.double() for x in (q, k, v, gates.g, gates.alpha, gates.beta)))
    return found


def paths(inputs: tuple[Tensor, ...], steps: int, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of the keys through H and through U [B,T,H,K], for a random direction of the normed readout.

    Args:
        inputs: q, k, v, g, alpha and beta of a layer, T a multiple of 64, or at most 64.
        steps: Chebyshev steps at a = 0.02.
        kind: "implicit" or "iteration", as in `Ridge`.
    """
    q, k, v, g, alpha, beta = inputs
    of_h, of_u = (k.clone().requires_grad_() for _ in range(2))
    chunk = min(CHUNK, q.shape[1])

    def cut(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (-1, chunk))

    system = plain_system(cut(beta).unsqueeze(-1) * cut(of_h), cut(g), 0.02, q.dtype)
    solve = partial(chebyshev_on, num_iter=steps)
    solve = implicitly(solve) if kind == "implicit" else solve
    x = solve(system, cut(q)).flatten(2, 3).transpose(1, 2)
    z = q + alpha.unsqueeze(-1) * (x - q)
    o, _ = chunk_simple_gla(z, of_u, v, g, beta=beta, backend="torch")
    o = RMSNorm(o.shape[-1]).to(o)(o)
    generator = torch.Generator(o.device).manual_seed(0)
    direction = torch.randn(o.shape, dtype=o.dtype, device=o.device, generator=generator)
    through_h, through_u = torch.autograd.grad((o * direction).sum(), (of_h, of_u))
    return through_h, through_u


def mean_paths(layers: list[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    """Norms through H, through U and of the sum, over that of the exact sum; means over layers."""
    exact = []
    for inputs in layers:
        h, u = paths(inputs, 120, "implicit")
        exact.append((h + u).norm())
    rows = []
    for steps in PATHS:
        for kind in KINDS:
            found = []
            for inputs, norm in zip(layers, exact, strict=True):
                h, u = paths(inputs, steps, kind)
                found.append(torch.stack([h.norm(), u.norm(), (h + u).norm()]) / norm)
            of_h, of_u, both = (finite(x) for x in torch.stack(found).mean(0).tolist())
            rows.append({"steps": steps, "kind": kind, "h": of_h, "u": of_u, "both": both})
    return rows
