"""Measurements of each GKA layer's memory on a text: decay, ridge, condition number, solver error.

Of a sketched layer they are those of the system that it solves, H' and U' of projected keys.

The model reads the text as usual, in pieces. H_t is also formed in float64 from the layer's keys and gates,
and measured at some positions of the text.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.layers.parts.surround import Gates
from gka.layers.recurrent_mixer import DECODE_TOKENS
from gka.maths.ridge import System
from gka.maths.solvers import SOLVERS, make_solver
from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.maths.solvers.exact import exact_solve
from gka.models import GKACache, GKAForCausalLM
from gka.ops import solver_steps
from gka.ops.checks import check_solver
from gka.serving.tokens import PREFILL_CHUNK, check_model, prefill

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_KEPT_DECAYS = 4096  # at most so many evenly spaced tokens enter the quantiles
CURVES = ("fro", "lambda", "condition", "steps", "error", "residual", "memory")


@torch.no_grad()
def inspect_model(
    model: GKAForCausalLM,
    tokens: Tensor | Sequence[int],
    *,
    positions: int = 64,
    chunk: int = PREFILL_CHUNK,
) -> dict[str, Any]:
    """Read one text and measure each layer's memory.

    Args:
        model: a model with at least one GKA layer.
        tokens: ids of one text [T] or [1,T].
        positions: number of evenly spaced positions to measure; the last token is one of them.
        chunk: tokens read at a time.

    Returns:
        A dictionary for JSON: `tokens`, `positions` (from 0) and `layers`, each with its index `layer` and
        `mixer`. GKA layers also have `ridge_ratio`, `num_iter`, `solver`, `condition_bound` (1+a)/a,
        `error_bound` (null if num_iter = 0), `heads` and `curves`. `heads` has for each head
        `decay_quantiles` (of gamma at QUANTILES), `half_life` in tokens (null without decay), means of
        `alpha` and `beta` (1 without the gate), `final_norm_h`, `final_norm_u`. `curves` has by position
        and head `fro` |H_t|, `lambda`, `condition` of A = H_t + lambda_t I, `steps` taken, `error`
        |x - x*|_A / |x*|_A against the exact solution x* in float64, `residual` |A x - q| / |q| (both null
        if num_iter = 0 or nothing was written), and `memory` sum_j prod gamma, the tokens remembered.

    Raises:
        InputError: a model without GKA layers, no tokens, several texts, positions < 1 or chunk < 1.
    """
    check_model(model)
    ids = torch.as_tensor(tokens, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise InputError(f"tokens: expected one text [T], got shape {tuple(ids.shape)}")
    if positions < 1:
        raise InputError(f"positions is {positions}; expected 1 or more")
    if "gka" not in model.config.pattern:
        mixers = ", ".join(sorted(set(model.config.pattern)))
        raise InputError(f"the model has no Gated KalmaNet layer to inspect (its mixers: {mixers})")
    places = _places(ids.shape[1], positions)
    cache = GKACache(model.config)
    watches = {
        index: _Watch(layer.mixer, places, ids.shape[1])
        for index, layer in enumerate(model.model.layers)
        if isinstance(layer.mixer, GatedKalmaNet)
    }
    with cache.observing({index: watch.look for index, watch in watches.items()}):
        prefill(model, ids, cache, chunk=chunk)
    layers = []
    for index, name in enumerate(model.config.pattern):
        layer = {"layer": index, "mixer": name}
        if index in watches:
            states: Any = cache.layers[index]
            layer |= watches[index].result(states.recurrent_states)
        layers.append(layer)
    return {"tokens": ids.shape[1], "positions": places, "layers": layers}


def _places(length: int, wanted: int) -> list[int]:
    """At most `wanted` evenly spaced positions of a text, the last token included."""
    return sorted({math.ceil((i + 1) * length / wanted) - 1 for i in range(wanted)})


class _Watch:
    """Measurements of one layer while it reads; `h` is H_t in float64 [1,H,K,K]."""

    def __init__(self, mixer: GatedKalmaNet, places: list[int], length: int):
        self.mixer = mixer
        self.places = places
        self.stride = -(-length // _KEPT_DECAYS)
        self.read = 0
        heads, dim, _ = mixer.state_shapes[0]
        options: Any = {"dtype": torch.float64, "device": mixer.q_proj.weight.device}
        self.h = torch.zeros(1, heads, dim, dim, **options)
        self.memory = torch.zeros(1, heads, **options)
        self.sums = {name: torch.zeros(heads, **options) for name in ("g", "alpha", "beta")}
        self.gammas: list[Tensor] = []
        self.curves: dict[str, list[Any]] = {name: [] for name in CURVES}

    def look(self, mixer: GatedKalmaNet, q: Tensor, k: Tensor, seen: Gates) -> None:
        """Process a piece of the text: q [1,T,H,K], k [1,T,Hk,K], gates [1,T,H]."""
        length = q.shape[1]
        heads = self.h.shape[1]
        q, k = mixer.as_solved(q), mixer.as_solved(k)
        taken = self._steps(q, k, seen)
        k = k.double().repeat_interleave(heads // k.shape[2], 2)
        zeros = q.new_zeros(q.shape[:3], dtype=torch.float64)
        g = zeros if seen.g is None else seen.g.double()
        gates = {"g": g}
        for name, gate in (("beta", seen.beta), ("alpha", seen.alpha)):
            gates[name] = zeros + 1.0 if gate is None else gate.double()
        for name, gate in gates.items():
            self.sums[name] += gate[0].sum(0)
        self.gammas.append(g[0, -self.read % self.stride :: self.stride].exp())
        fades = g if mixer.use_forgetting_gate_kk else torch.zeros_like(g)
        weighted = k * gates["beta"][..., None]
        begin = 0
        here = [p - self.read for p in self.places if self.read <= p < self.read + length]
        for end in sorted({p + 1 for p in here} | {length}):
            self._advance(weighted[:, begin:end], fades[:, begin:end])
            if end - 1 in here:
                self._measure(q[:, end - 1], taken[0, end - 1])
            begin = end
        self.read += length

    def _steps(self, q: Tensor, k: Tensor, seen: Gates) -> Tensor:
        """Solver steps of the piece's tokens [1,T,H] on the backend that runs it.

        Pieces of at most DECODE_TOKENS get the torch backend's, as decode kernels do not return theirs.
        """
        mixer, length, heads = self.mixer, k.shape[1], self.h.shape[1]
        if mixer.num_iter == 0 or not SOLVERS[check_solver(mixer.solver)].adaptive:
            return torch.full((1, length, heads), mixer.num_iter)
        stepwise = length <= DECODE_TOKENS
        state = self.h if k.dtype == torch.float64 else self.h.float()
        return solver_steps(
            k, seen.g if mixer.use_forgetting_gate_kk else None, mixer.ridge_ratio, mixer.num_iter,
            state, solver=mixer.solver, beta=seen.beta, q=q if mixer.solver == "cg" else None,
            num_heads=heads, value_dim=mixer.head_v_dim,
            chunk_size=1 if stepwise else 64, backend="torch" if stepwise else mixer.backend,
        )  # fmt: skip

    def _advance(self, k: Tensor, g: Tensor) -> None:
        """Advance `h` and `memory` over some tokens; k includes the write gate."""
        if k.shape[1] == 0:
            return
        total = g.cumsum(1)
        to_end = (total[:, -1:] - total).exp()
        whole = total[:, -1].exp()
        self.h = whole[..., None, None] * self.h + torch.einsum("bth,bthi,bthj->bhij", to_end, k, k)
        self.memory = whole * self.memory + to_end.sum(1)

    def _measure(self, q: Tensor, taken: Tensor) -> None:
        """Measure at a token with query q [1,H,K], whose solve takes `taken` [H] steps."""
        a, steps = self.mixer.ridge_ratio, self.mixer.num_iter
        h, fro = self.h, self.h.square().sum((-2, -1)).sqrt()
        lamb = a * fro
        values = torch.linalg.eigvalsh(h).clamp_min(0)
        condition = (values[..., -1] + lamb) / (values[..., 0] + lamb)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        system = System.of_state(h.to(dtype))
        found = {"fro": fro, "lambda": lamb, "memory": self.memory}
        for name, value in found.items():
            self.curves[name].append(_plain(value[0]))
        self.curves["condition"].append(_plain(condition[0]))
        solver = make_solver(check_solver(self.mixer.solver), a, steps)
        self.curves["steps"].append([int(n) for n in taken])
        error, residual = torch.full_like(fro, torch.nan), torch.full_like(fro, torch.nan)
        if steps > 0:
            x = solver.solve(system, q.to(dtype).unsqueeze(-2))
            error, residual = _solve_error(h, lamb, q.double(), x.squeeze(-2).double())
            empty = system.empty[..., 0]
            error, residual = (e.masked_fill(empty, torch.nan) for e in (error, residual))
        self.curves["error"].append(_plain(error[0]))
        self.curves["residual"].append(_plain(residual[0]))

    def result(self, states: dict[int, Tensor]) -> dict[str, Any]:
        """The layer's entry of the result, given its final states."""
        mixer = self.mixer
        gamma = torch.cat(self.gammas)
        quantiles = torch.quantile(gamma, gamma.new_tensor(QUANTILES), dim=0)
        means = {name: total / self.read for name, total in self.sums.items()}
        half_life = math.log(2) / -means["g"]
        norms = [states[i][0].double().square().sum((-2, -1)).sqrt() for i in (0, 1)]
        by_head = {
            "decay_quantiles": [_plain(q) for q in quantiles.mT],
            "half_life": _plain(half_life),
            "alpha": _plain(means["alpha"]),
            "beta": _plain(means["beta"]),
            "final_norm_h": _plain(norms[0]),
            "final_norm_u": _plain(norms[1]),
        }
        a, steps = mixer.ridge_ratio, mixer.num_iter
        return {
            "ridge_ratio": a,
            "num_iter": steps,
            "solver": mixer.solver,
            "condition_bound": (1 + a) / a,
            "error_bound": chebyshev_bound(a, steps) if steps else None,
            "heads": [
                {name: values[head] for name, values in by_head.items()}
                for head in range(len(norms[0]))
            ],
            "curves": self.curves,
        }


def _solve_error(h: Tensor, lamb: Tensor, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """|x - x*|_A / |x*|_A and |A x - q| / |q| with A = H + lambda I, [1,H] each, all float64."""
    exact = exact_solve(h, q, lamb.clamp_min(torch.finfo(lamb.dtype).tiny ** 0.4))

    def apply(y: Tensor) -> Tensor:
        return (h @ y.unsqueeze(-1)).squeeze(-1) + lamb.unsqueeze(-1) * y

    def energy(y: Tensor) -> Tensor:
        return (y * apply(y)).sum(-1).clamp_min(0).sqrt()

    return energy(x - exact) / energy(exact), (apply(x) - q).norm(dim=-1) / q.norm(dim=-1)


def _plain(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which has no NaN and no infinity."""
    return [float(x) if math.isfinite(x) else None for x in values.tolist()]
