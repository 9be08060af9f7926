"""Random calls: shapes, dtypes, decays, gates, states, packing, strides and wanted gradients."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from problems import Problem

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPS = (
    ("chunk_gka", 40), ("fused_recurrent_gka", 15), ("chunk_simple_gla", 10), ("fused_recurrent_gka_", 8),
    ("advance_states_", 4), ("chunk_gated_delta_rule", 10), ("fused_recurrent_gated_delta_rule", 5),
)  # fmt: skip
DIMS = (1, 2, 3, 5, 7, 8, 8, 16, 16, 17, 31, 32, 33, 64)
CHUNKS = (1, 2, 3, 5, 8, 16, 16, 31, 32, 64, 64, 100, 257)
DECAYS = ("zero", "tiny", "usual", "usual", "strong", "wide", "spots", "spots", "every token")
RESETS = (-104.0, -1e4, -1e6, -1e13, -1e18, torch.finfo(F32).min, -torch.inf)
MOST_NUMBERS = 400_000  # of the states of all tokens


@dataclass
class Call:
    """One call of an op.

    Attributes:
        problem: its tensors, in their dtypes and strides.
        settings: its numbers and options.
        wanted: inputs whose gradients are asked for.
        used: outputs that the loss is made of.
        traits: what the draw chose, for the report.
    """

    op: str
    backend: str
    problem: Problem
    settings: dict[str, Any]
    wanted: tuple[str, ...] = ()
    used: tuple[str, ...] = ("o",)
    traits: dict[str, str] = field(default_factory=dict)

    @property
    def work(self) -> torch.dtype:
        return F64 if self.problem.q.dtype == F64 else F32

    @property
    def is_delta(self) -> bool:
        return "delta" in self.op

    @property
    def in_place(self) -> bool:
        return self.op.endswith("_")


def chance(rng: random.Random, p: float) -> bool:
    return rng.random() < p


def draw_call(seed: int, index: int, triton: bool = False) -> Call:
    """The call of that number; `triton`: one that its interpreter runs."""
    rng = random.Random(f"{seed}/{index}")
    torch.manual_seed(rng.getrandbits(48))
    names, weights = zip(*(OPS[:5] if triton else OPS), strict=True)
    op = rng.choices(names, weights)[0]
    dtype = rng.choices((F32, F64, BF16, F16), (45, 20, 20, 15))[0]
    if triton and dtype == F64:
        dtype = F32
    call = Call(op, "triton" if triton else "torch", _tensors(rng, op, dtype, triton), {})
    call.settings = _settings(rng, call, triton)
    if not triton and op in ("chunk_gka", "fused_recurrent_gka") and chance(rng, 0.1):
        call.backend = "torch" if _beyond_reference(call) else "reference"
    _choose_gradients(rng, call)
    strides = _restride(rng, call)
    p = call.problem
    call.traits |= {
        "backend": call.backend, "dtype": str(dtype).removeprefix("torch."), "strides": strides,
        "packed": str(p.cu_seqlens is not None), "gradient": str(bool(call.wanted)),
        "solver": call.settings.get("solver", "none"), "states": str(p.u0 is not None),
    }  # fmt: skip
    return call


def _beyond_reference(call: Call) -> bool:
    """The reference has one solver, and squares H as it stands: keys of norm above 4e9 overflow there."""
    k = call.problem.k
    huge = bool(k.numel()) and k.double().abs().max().item() > 1e9
    return huge or call.settings["solver"] != "chebyshev"


def _shape(
    rng: random.Random, op: str, triton: bool
) -> tuple[int, int, tuple[int, int, int], int, int]:
    """B, T, head counts, K, V, small enough together."""
    while True:
        batch = rng.choice((0, 1, 1, 1, 2, 3))
        length = rng.choice(
            (0, 1, 1, 2, 3, 5, rng.randint(1, 20), rng.randint(10, 40), rng.randint(60, 150))
        )
        if op.endswith("_"):
            length = min(length, 64)
        if triton:
            length = min(length, 35)
        heads = rng.choice((1, 1, 2, 3, 4, 6))
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        counts = (heads, rng.choice(divisors), rng.choice(divisors))
        key_dim, value_dim = rng.choice(DIMS), rng.choice(DIMS)
        if batch * length * heads * key_dim * max(key_dim, value_dim) <= MOST_NUMBERS:
            return batch, length, counts, key_dim, value_dim


def _tensors(rng: random.Random, op: str, dtype: torch.dtype, triton: bool) -> Problem:
    batch, length, (h, hk, hv), key_dim, value_dim = _shape(rng, op, triton)
    delta, in_place = "delta" in op, op.endswith("_")
    cu_seqlens, sequences = None, batch
    if not in_place and chance(rng, 0.3):
        batch = 1
        cu_seqlens = _bounds(rng, length)
        sequences = len(cu_seqlens) - 1
    gate_dtype = dtype if dtype == F64 else rng.choice((F32, F32, F32, dtype, F64))
    size = (
        1.0 if delta else _key_size(rng, F16 if triton else dtype)
    )  # its F_t^2 overflows above 4e9
    q, v = torch.randn(batch, length, h, key_dim), torch.randn(batch, length, hv, value_dim)
    k = _keys(rng, batch, length, hk, key_dim, delta) * size
    work = F64 if dtype == F64 else F32
    root = torch.randn(sequences, h, key_dim, key_dim, dtype=F64) * size
    u0 = (torch.randn(sequences, h, key_dim, value_dim, dtype=F64) * size).to(work)
    states = in_place or chance(rng, 0.5)
    tied = chance(rng, 0.5)
    shape = (batch, length, h)
    gates = [_decay(rng, shape, gate_dtype) if chance(rng, 0.8) else None for _ in range(2)]
    if delta or op == "chunk_simple_gla":
        gates[1], tied = None, False
    mixes = not delta and op not in ("chunk_simple_gla", "advance_states_")
    return Problem(
        q=(normalize(q, dim=-1) * rng.choice((1.0, 1.0, 1.0, 1e-3, 10.0))).to(dtype),
        k=k.to(dtype),
        v=(v * rng.choice((1.0, 1.0, 1e-3, 10.0))).to(dtype),
        g=gates[0],
        gk=None if tied else gates[1],
        alpha=_gate(rng, shape, gate_dtype) if mixes and chance(rng, 0.6) else None,
        beta=_gate(rng, shape, gate_dtype, lowest=0.1) if chance(rng, 0.6) else None,
        h0=(root @ root.mT / key_dim).to(work) if states and not delta else None,
        u0=u0 if states else None,
        cu_seqlens=cu_seqlens,
        tied=tied and gates[0] is not None,
    )


def _bounds(rng: random.Random, length: int) -> Tensor:
    cuts = sorted(rng.choices(range(length + 1), k=rng.randint(0, 4)))
    return torch.tensor([0, *cuts, length], dtype=rng.choice((torch.int64, torch.int32)))


def _key_size(rng: random.Random, dtype: torch.dtype) -> float:
    if dtype == F16:
        return rng.choice((1.0, 1.0, 1e-2, 10.0))
    return rng.choice((1.0,) * 8 + (1e-3, 1e-5, 1e3, 1e6, 1e11))


def _keys(rng: random.Random, batch: int, length: int, heads: int, dim: int, delta: bool) -> Tensor:
    k = normalize(torch.randn(batch, length, heads, dim), dim=-1)
    kind = rng.choice(("unit", "unit", "unit", "same", "one-hot", "zeros", "mixed"))
    if kind == "same":
        k = k[:, :1].expand_as(k) if length else k
    elif kind == "one-hot":
        k = torch.eye(dim)[torch.randint(dim, (batch, length, heads))]
    elif kind == "zeros":
        k = k * (torch.rand(batch, length, heads, 1) < 0.5)
    elif kind == "mixed" and not delta:
        k = k * 10.0 ** torch.empty(batch, length, heads, 1).uniform_(-2, 2)
    return k


def _gate(
    rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, lowest: float = 0.0
) -> Tensor:
    kind = rng.choice(("usual", "usual", "usual", "ends", "one", "floor"))
    x = torch.rand(shape, dtype=F64)
    if kind == "ends":
        x = x.round()
    elif kind == "one":
        x = torch.ones_like(x)
    elif kind == "floor":
        x = torch.full_like(x, 1e-6)
    return (lowest + (1 - lowest) * x if kind == "usual" else x).to(dtype)


def _decay(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Log decays of one kind; the strongest are hard resets."""
    kind, u = rng.choice(DECAYS), torch.rand(shape, dtype=F64)
    if kind == "zero":
        g = 0.0 * u
    elif kind == "tiny":
        g = -1e-6 * u
    elif kind == "strong":
        g = torch.full_like(u, rng.choice((-1.0, -5.0, -20.0, -100.0, -1000.0)))
    elif kind == "wide":
        g = -(10.0 ** (9.0 * u - 6.0))
    else:
        g = -0.2 * u
    if kind == "spots":
        values = torch.tensor(rng.choices(RESETS, k=2), dtype=F64)
        picked = values[torch.randint(2, shape)]
        g = torch.where(torch.rand(shape) < rng.choice((0.05, 0.3)), picked, g)
    elif kind == "every token":
        g = torch.full_like(u, rng.choice(RESETS))
    return g.to(dtype)


def _settings(rng: random.Random, call: Call, triton: bool) -> dict[str, Any]:
    scale = rng.choice((None, 1.0, 0.3))
    if call.op == "advance_states_":
        return {}
    if call.is_delta:
        return {"scale": scale}
    settings: dict[str, Any] = {"scale": scale}
    if call.op != "chunk_simple_gla":
        ridge_ratio = rng.choice((0.02,) * 6 + (0.005, 0.05, 0.3, 2.0))
        num_iter = rng.choice((0, 1, 2, 5, 12, 30, 30, 30, 30, 60, 120))
        drawn = rng.random()
        solver = "adaptive" if drawn < 0.2 else "cg" if drawn < 0.35 else "chebyshev"
        if (
            solver != "chebyshev"
        ):  # steps of its own, within num_iter's error bound: let it be small
            ridge_ratio, num_iter = max(ridge_ratio, 0.02), rng.choice((60, 90, 120))
        settings |= {"ridge_ratio": ridge_ratio, "num_iter": num_iter, "solver": solver}
    if call.op.startswith("chunk"):
        settings["chunk_size"] = rng.choice((16, 16, 32)) if triton else rng.choice(CHUNKS)
    if call.op == "fused_recurrent_gka_":
        settings["commit"] = chance(rng, 0.7)
    return settings


def _choose_gradients(rng: random.Random, call: Call) -> None:
    if call.in_place or chance(rng, 0.35):
        return
    names = list(call.problem.tensors())
    if call.op == "chunk_simple_gla" or call.is_delta:
        names = [name for name in names if name != "h0"]
    call.wanted = tuple(name for name in names if chance(rng, 0.7)) or (names[0],)
    outputs = ["o", "u"] if call.is_delta or call.op == "chunk_simple_gla" else ["o", "h", "u"]
    call.used = tuple(n for n in outputs if n == "o" or chance(rng, 0.5))


def _restride(rng: random.Random, call: Call) -> str:
    kinds = ("plain", "plain", "transposed", "sliced", "expanded")
    if call.in_place:  # states must be as they are
        kinds = ("plain", "transposed", "sliced")
    kind = rng.choice(kinds)
    skipped = ("h0", "u0") if call.in_place else ()
    tensors = {n: x for n, x in call.problem.tensors().items() if n not in skipped}
    changed = {n: restrided(rng, x, kind) if n not in ("h0",) else x for n, x in tensors.items()}
    call.problem = replace(call.problem, **changed)
    return kind


def restrided(rng: random.Random, x: Tensor, kind: str) -> Tensor:
    """x in other strides; "expanded" repeats its first entries, which changes values."""
    if kind == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if kind == "expanded":
        dim = rng.randrange(x.dim())
        return x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x) if x.shape[dim] else x
    return x
