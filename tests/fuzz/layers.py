"""Random mixers on random hidden states: float32 against the same layer in float64, token by token."""

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import truth
from fuzz.compare import SEEDS, STEP, Verdict, finding, judge_by_draws, upstream
from fuzz.draw import F32, Call
from fuzz.truth import EXACT, Rounding
from gka.layers import MIXERS, DeltaNet, StateCache
from gka.ops.delta_rule import CHUNK_SIZE
from problems import Problem

MIXER_OPTIONS: dict[str, list[Any]] = {
    "num_kv_heads": [None, 1], "expand_v": [1.0, 0.5, 2.0], "use_gate": [True, False], "conv_size": [1, 2, 4],
    "use_v_conv": [True, False], "use_beta_gate": [True, False], "use_alpha_connection": [True, False],
    "use_forgetting_gate": [True, True, False], "use_forgetting_gate_kk": [True, False],
    "gla_rescale": [True, False], "num_iter": [0, 5, 30], "ridge_ratio": [0.02, 0.1],
    "window_size": [1, 3, 64], "qk_norm": [True, False],
}  # fmt: skip
# A parameter p that the loss hardly depends on (a scale before a norm, say) has a derivative of which only
# rounding is left: this many roundings of terms that are as large as any other parameter's |q| |dq|.
CANCELLED = 256.0
# A_log of the decay exp(A_log) softplus(.): usual, and so large that every token is a hard reset.
A_LOGS = (0.0, 0.0, 0.0, 3.0, 10.0, 40.0, 88.0, 100.0)


@dataclass
class LayerCall(Call):
    """A mixer's call.

    Attributes:
        layer: in float32.
        x: hidden states [B,T,D].
        mask: padding, or None.
        cu_seqlens: bounds of packed sequences, or None.
        cuts: where the actual call is split, the cache carried over; none: one call without a cache.
    """

    layer: nn.Module = field(default_factory=nn.Identity)
    x: Tensor = field(default_factory=lambda: torch.zeros(0))
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cuts: tuple[int, ...] = ()

    @property
    def work(self) -> torch.dtype:
        return F32


def draw_layer(seed: int, index: int) -> LayerCall:
    """The layer's call of that number."""
    rng = random.Random(f"layer {seed}/{index}")
    torch.manual_seed(rng.getrandbits(48))
    name = rng.choices(list(MIXERS), (4, 1, 1, 2, 1, 2))[0]
    layer = _mixer(rng, name)
    batch, length = rng.choice((0, 1, 2, 3)), rng.choice((1, 2, 5, 17, rng.randint(1, 80)))
    sizes = (1.0, 1.0, 1e-3) if name in ("attention", "swa") else (1.0, 1.0, 1e-3, 30.0)
    x = torch.randn(batch, length, 16) * rng.choice(sizes)  # a softmax of large ones is saturated
    call = LayerCall(f"layer {name}", "torch", None, {}, layer=layer, x=x)  # pyright: ignore[reportArgumentType]
    call.traits = {"op": call.op}
    way = rng.choice(("plain", "plain", "mask", "packed", "cache"))
    if way == "mask" and batch:
        starts, ends = torch.randint(0, length, (2, batch, 1))
        places = torch.arange(length)
        call.mask = (places >= starts.minimum(ends)) & (places <= starts.maximum(ends))
    elif way == "packed":
        call.x = x = torch.randn(1, length, 16)
        cuts = sorted(rng.choices(range(length + 1), k=rng.randint(0, 3)))
        call.cu_seqlens = torch.tensor([0, *cuts, length])
    elif way == "cache":
        call.cuts = tuple(sorted(set(rng.choices(range(length + 1), k=2)) | {0, length}))
    call.traits |= {"dtype": "float32", "way": way}
    call.wanted = ("x",) if way != "cache" else ()
    return call


def _mixer(rng: random.Random, name: str) -> nn.Module:
    from gka.layers import mixer_options

    known = mixer_options(name)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_heads": 2,
        "head_dim": rng.choice((2, 4, 8, 16)),
    }
    chosen = {key: rng.choice(values) for key, values in MIXER_OPTIONS.items() if key in known}
    if "backend" in known:
        chosen["backend"] = "torch"
    layer = MIXERS[name](**sizes, **chosen, layer_idx=0)
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if key == "A_log":
                p.add_(rng.choice(A_LOGS))
            elif p.dim() > 1:
                p.mul_(rng.choice((1.0, 1.0, 3.0)))
    return layer


def run_layer(call: LayerCall, layer: nn.Module, x: Tensor) -> Tensor:
    """The output of the call as it is meant."""
    if not call.cuts:
        return layer(x, attention_mask=call.mask, cu_seqlens=call.cu_seqlens)[0]
    cache, parts = StateCache(), []
    for a, b in itertools.pairwise(call.cuts):
        parts.append(layer(x[:, a:b], past_key_values=cache)[0])
    return torch.cat(parts, 1)


def step_by_step(layer: nn.Module, x: Tensor) -> Tensor:
    """Token by token through a cache."""
    cache = StateCache()
    parts = [layer(x[:, t : t + 1], past_key_values=cache)[0] for t in range(x.shape[1])]
    return torch.cat(parts, 1) if parts else x


def pieces(call: LayerCall) -> list[tuple[int, Tensor]]:
    """(row, places) of every sequence that stands alone in the call."""
    rows, length = range(call.x.shape[0]), call.x.shape[1]
    if call.cu_seqlens is not None:
        return [(0, torch.arange(a, b)) for a, b in itertools.pairwise(call.cu_seqlens.tolist())]
    if call.mask is not None:
        return [(b, call.mask[b].nonzero().flatten()) for b in rows]
    return [(b, torch.arange(length)) for b in rows]


def expected_layer(call: LayerCall, layer: nn.Module, x: Tensor, run: Callable) -> Tensor:
    """Every sequence alone; padding gives zeros."""
    out = torch.zeros_like(x)
    for row, places in pieces(call):
        if len(places):
            out = out.index_put(
                (torch.tensor(row), places), run(layer, x[row : row + 1, places])[0]
            )
    return out


def judge_layer(call: LayerCall, seed: int = 0) -> Verdict:
    """Output against float64 token by token; gradients of hidden states and parameters against float64."""
    x = call.x.detach().requires_grad_(bool(call.wanted))
    try:
        with torch.set_grad_enabled(bool(call.wanted)):
            actual = _with_gradients(call, call.layer, x, run_layer(call, call.layer, x))
    except Exception as error:
        return Verdict("raised", message=f"{type(error).__name__}: {error}")
    expected = _double(call)
    plain = _with_roundings(call, EXACT)

    def draw(number: int) -> dict[str, Tensor]:
        rounded = Rounding(STEP, seed + SEEDS * number, torch.finfo(F32).smallest_normal)
        return _with_roundings(call, rounded)

    return judge_by_draws(
        lambda changes: _judge(call, actual, expected, changes), plain, draw(0), draw
    )


def _judge(
    call: LayerCall,
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    changes: dict[str, float],
) -> Verdict:
    """Compare name by name; `changes`: what a unit of rounding changes each by, in the 2-norm."""
    verdict = Verdict()
    sizes = {f"d{name}": p.norm().item() for name, p in call.layer.named_parameters()}
    sizes["dx"] = call.x.norm().item()
    terms = [expected[n].norm().item() * size for n, size in sizes.items() if n in expected]
    most = max(terms, default=0.0)
    for name, y in actual.items():
        size = sizes.get(name, 0.0)
        floor = CANCELLED * torch.finfo(F32).eps * most / size if size > 0 else 0.0
        found = finding(name, y, expected[name], changes[name], call, floor)
        if found is None:
            continue
        verdict.findings.append(found)
        if found.error == float("inf"):
            verdict.status = "non-finite"
        elif not found.error <= 1 and verdict.status == "right":
            verdict.status = "wrong"
    return verdict


def _double(call: LayerCall) -> dict[str, Tensor]:
    """The float64 answer: the output token by token, gradients by the library's own derivative."""
    layer = copy.deepcopy(call.layer).double()
    x = call.x.detach().double()
    with torch.no_grad():
        o = expected_layer(call, layer, x, step_by_step)
    if not call.wanted:
        return {"o": o}
    if hasattr(layer, "backend") and hasattr(layer, "ridge_ratio"):
        layer.__dict__["backend"] = (
            "torch"  # its derivative is the library's; the reference's is another
        )
    x.requires_grad_()
    whole = expected_layer(call, layer, x, lambda mixer, y: mixer(y)[0])
    return _with_gradients(call, layer, x, whole) | {"o": o}


def _with_roundings(call: LayerCall, rounded: Rounding) -> dict[str, Tensor]:
    """The float64 answer with every number rounded, those inside the memory too."""
    layer: Any = copy.deepcopy(call.layer).double()
    x = rounded.change(call.x.detach().double()) if rounded.step > 0 else call.x.detach().double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(rounded.change(p) if rounded.step > 0 else p)
    for module in layer.modules():
        module.register_forward_hook(
            lambda m, i, out: rounded(out) if isinstance(out, Tensor) else out
        )
    if hasattr(layer, "mix"):
        layer.mix = lambda q, k, v, gates, run: (_memory(layer, rounded, q, k, v, gates), ())
    x.requires_grad_(bool(call.wanted))
    with (
        truth.as_the_library(F32, True, rounded),
        torch.set_grad_enabled(bool(call.wanted)),
    ):
        o = expected_layer(call, layer, x, lambda mixer, y: mixer(y)[0])
        return _with_gradients(call, layer, x, o)


def _memory(layer: Any, rounded: Rounding, q: Tensor, k: Tensor, v: Tensor, gates: Any) -> Tensor:
    """The readout of the mixer's memory, token by token, of sequences that nothing precedes."""
    problem = Problem(
        rounded(q), rounded(k), rounded(v), g=gates.g, alpha=gates.alpha, beta=gates.beta,
        tied=getattr(layer, "use_forgetting_gate_kk", False) and gates.g is not None,
    )  # fmt: skip
    settings: dict[str, Any] = {"scale": getattr(layer, "scale", layer.head_dim**-0.5)}
    if isinstance(layer, DeltaNet):
        settings["chunk_size"] = CHUNK_SIZE
        return truth.answer(problem, truth.delta_sequence, rounded, **settings)["o"]
    settings |= {name: getattr(layer, name, 0) for name in ("ridge_ratio", "num_iter")}
    return truth.answer(problem, truth.gka_sequence, rounded, **settings)["o"]


def _with_gradients(call: LayerCall, layer: nn.Module, x: Tensor, o: Tensor) -> dict[str, Tensor]:
    if not call.wanted:
        return {"o": o}
    named = {"x": x, **dict(layer.named_parameters())}
    loss = (o.double() * upstream({"o": o})["o"]).sum()
    grads = [None] * len(named)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zeros = ((name, p, grad) for (name, p), grad in zip(named.items(), grads, strict=True))
    found = {f"d{n}": torch.zeros_like(p) if grad is None else grad for n, p, grad in zeros}
    return {"o": o.detach()} | found
