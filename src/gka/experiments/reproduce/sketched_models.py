"""Of `sketching`: small language models, trained plain or sketched, and what a sketch costs them."""

import importlib.util
import io
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.experiments.reproduce.experiment import finite
from gka.maths.reference import solve_ridge
from gka.maths.sketch import orthonormal, spectral_basis
from gka.maths.solvers.exact import exact_solve

RATIO = 0.02
KEYS = ("white", "SiLU", "decaying spectrum")
BASES = ("random", "spectral")
WITH_RIDGE = {"": False, ", λ of H": True}
"""Whose norm the ridge follows, that of S^T H S or of H, in the names of errors."""


@dataclass(frozen=True)
class Training:
    """A model of `layers` layers of `heads` heads of `dim`, trained on Python's standard library, by bytes.

    At most `blocks` blocks of `length` tokens are held out for its losses. `package`: of the library; "" all.
    """

    width: int
    layers: int
    heads: int
    dim: int
    length: int
    batch: int
    steps: int
    blocks: int
    rate: float = 4e-3
    package: str = ""


def draw_keys(kind: str, count: int, tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit keys [count,tokens,dim], float64."""
    x = torch.randn(count, tokens, dim, generator=generator, dtype=torch.float64)
    if kind == "SiLU":
        x = silu(x)
    if (
        kind == "decaying spectrum"
    ):  # standard deviations 1, 1/2, ..., 1/dim, in directions of their own
        mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        x = (x / torch.arange(1, dim + 1)) @ torch.linalg.qr(mix).Q.mT
    return normalize(x, dim=-1)


def sketch_error(h: Tensor, q: Tensor, basis: Tensor, whole_ridge: bool = False) -> float:
    """|S x' - x|_H / |x|_H over all systems, exact solves, a = 0.02, in float64.

    Squared it is the expected error of the readout U^T x if values are independent, of one size, and nothing
    decays: U = sum_i k_i v_i^T then has E[U U^T] = H. 1 is the error of no readout at all.

    Args:
        h: [S,K,K]. q: [S,K]. basis: S [S,K,d] or [K,d].
        whole_ridge: whether lambda' is a |H|_F instead of a |S^T H S|_F.
    """
    x = solve_ridge(h, q, RATIO, 1, "exact")
    inside = (q.unsqueeze(-2) @ basis).squeeze(-2)
    norms = (h if whole_ridge else basis.mT @ h @ basis).square().sum((-2, -1)).sqrt()
    inside = exact_solve(basis.mT @ h @ basis, inside, RATIO * norms)
    e = (basis @ inside.unsqueeze(-1)).squeeze(-1) - x

    def energy(y: Tensor) -> Tensor:
        return (y.unsqueeze(-2) @ h @ y.unsqueeze(-1)).sum()

    return float((energy(e) / energy(x)).sqrt())


def random_basis(like: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns [...,K,d] for matrices `like` [...,K,K]."""
    drawn = torch.randn(*like.shape[:-1], dim, generator=generator, dtype=torch.float64)
    return orthonormal(drawn)


def measure_keys(
    kind: str, count: int, dim: int, dims: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """Errors by basis and d for untrained keys; the spectral basis is that of other streams' mean moment."""
    generator = torch.Generator().manual_seed(seed)
    there, here = ((k := draw_keys(kind, count, 4 * dim, dim, generator)).mT @ k for _ in range(2))
    q = draw_keys(kind, 1, count, dim, generator)[0]
    return {"of": "keys", "keys": kind, "dim": dim, "seed": seed} | _errors(
        here, q, there.mean(0), dims, generator
    )


def _errors(
    h: Tensor, q: Tensor, mean: Tensor, dims: tuple[int, ...], generator: torch.Generator
) -> dict[str, Any]:
    """Errors on systems h and queries q of bases from `mean`, and the share of energy that these keep."""
    errors: dict[str, list[float | None]] = {b + r: [] for b in BASES for r in WITH_RIDGE}
    kept = []
    for d in dims:
        basis = spectral_basis(mean, d)
        for name, one in zip(BASES, (random_basis(mean, d, generator), basis), strict=True):
            for ridge, whole in WITH_RIDGE.items():
                errors[name + ridge].append(finite(sketch_error(h, q, one, whole), 3))
        inside = (basis.mT @ h @ basis).diagonal(dim1=-2, dim2=-1).sum()
        kept.append(finite(float(inside / h.diagonal(dim1=-2, dim2=-1).sum()), 3))
    return {"dims": list(dims), "errors": errors, "energy": kept}


def _folder(package: str) -> str:
    """The folder of a package of Python's standard library."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent)


@contextmanager
def trained(size: Training, seed: int, device: str, **fields: Any) -> Iterator[tuple[Any, Tensor]]:
    """A trained model in evaluation mode, and its held-out text in blocks [N,length].

    On a GPU, too, its ops are plain torch: kernels of so many small head sizes take longer to compile.
    """
    from rich.console import Console

    from gka.experiments.reproduce.trained import held_out_ids
    from gka.training import RunConfig, train

    text = {}
    if size.package:
        text = {"text": [_folder(size.package)], "glob": "*.py", "eval_fraction": 0.1}
    config = RunConfig.from_tables({
        "data": {"sequence_length": size.length, **text},
        "model": {"hidden_size": size.width, "num_hidden_layers": size.layers, "num_heads": size.heads,
                  "head_dim": size.dim, "tie_word_embeddings": True, "backend": "torch", **fields},
        "training": {"max_steps": size.steps, "batch_size": size.batch, "learning_rate": size.rate,
                     "warmup_steps": max(1, size.steps // 20), "eval_steps": size.steps,
                     "save_steps": size.steps, "health_steps": 0, "compile": "off", "seed": seed},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(config, run, console=Console(file=io.StringIO()))
        model, ids = held_out_ids(run, size.blocks * size.length)
        blocks = ids[: len(ids) // size.length * size.length].view(-1, size.length)
        yield model.to(device), blocks.to(device)


@torch.no_grad()
def bits_per_byte(model: Any, blocks: Tensor) -> float | None:
    """Held-out loss by tokens that are bytes."""
    total, rows = 0.0, 16
    for part in blocks.split(rows):
        total += float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part)
    return finite(total / len(blocks) / math.log(2), 5)


def split_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A quarter to measure bases on, and the rest, on which every loss is measured."""
    first = max(1, len(blocks) // 4)
    return blocks[:first], blocks[first:]


def measure_plain(size: Training, dims: tuple[int, ...], seed: int, device: str) -> dict[str, Any]:
    """A model trained without a sketch: its loss, and that of its sketches, without more training."""
    from gka.models.sketch import measure_bases, measure_moments, sketched

    with trained(size, seed, device) as (model, blocks):
        there, here = split_blocks(blocks)
        found: dict[str, Any] = {"of": "plain", "seed": seed, "dim": size.dim, "dims": list(dims)}
        found["loss"] = bits_per_byte(model, here)
        losses: dict[str, list[float | None]] = {name: [] for name in BASES}
        for d in dims:
            torch.manual_seed(seed)
            losses["random"].append(bits_per_byte(sketched(model, d), here))
            bases = measure_bases(model, there, d)
            losses["spectral"].append(bits_per_byte(sketched(model, d, bases), here))
        found["losses"] = losses
        moments = measure_moments(model, there)
        systems = systems_of(model, here[: max(1, 1024 // size.length)])
    generator = torch.Generator().manual_seed(seed)
    heads = [
        _errors(h[:, i], q[:, i], moments[layer][i].cpu(), dims, generator)
        for layer, (h, q) in systems.items()
        for i in range(h.shape[1])
    ]
    every = {
        name: torch.tensor([head["errors"][name] for head in heads]) for name in heads[0]["errors"]
    }
    found["key errors"] = {
        name: [finite(x, 3) for x in one.square().mean(0).sqrt().tolist()]
        for name, one in every.items()
    }
    energy = torch.tensor([head["energy"] for head in heads])
    return found | {"energy": [finite(x, 3) for x in energy.mean(0).tolist()]}


@torch.no_grad()
def systems_of(model: Any, blocks: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """(H_T [N,H,K,K], q_T [N,H,K]) float64 at the end of each block, by layer."""
    from gka.models import GKACache
    from gka.ops import end_state

    found: dict[int, tuple[Tensor, Tensor]] = {}

    def look(mixer: Any, q: Tensor, k: Tensor, gates: Any) -> None:
        g, beta = (None if x is None else x.double() for x in (gates.g, gates.beta))
        h = end_state(k.double(), k.double(), g, g, beta, num_heads=q.shape[2]).h_kk
        found[mixer.layer_idx] = h.cpu(), q[:, -1].double().cpu()

    cache = GKACache(model.config)
    with cache.observing(dict.fromkeys(range(len(model.model.layers)), look)):
        model(input_ids=blocks, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return found


def measure_trained(
    size: Training, how: str, sketch: int | None, seed: int, device: str
) -> dict[str, Any]:
    """A model trained sketched ("learned", "fixed": a random map) or without a solve ("gla"): its loss."""
    fields: dict[str, Any] = (
        {"mixer": "gla"} if how == "gla" else {"sketch_dim": sketch, "sketch": how}
    )
    with trained(size, seed, device, **fields) as (model, blocks):
        loss = bits_per_byte(model, split_blocks(blocks)[1])
    return {"of": "trained", "how": how, "sketch": sketch, "seed": seed, "loss": loss}
