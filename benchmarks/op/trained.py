"""Inputs of the op as a trained model's layers make them: q, k, v and gates, and how long its heads remember.

A model has heads that remember hundreds of tokens and heads that remember fewer than ten. The adaptive solver
and conjugate gradients take other numbers of steps on each. The model reads text that it was not trained on.
The heads of all its layers are put in order of their memory, and as many as are asked for are taken at equal
distances, so the mix stays that of the model.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.decode.states import places
from benchmarks.registry import Inputs, NotAvailable, Size
from benchmarks.results import name_of
from torch import Tensor

from gka.errors import InputError
from gka.layers import gated_kalmanet
from gka.storage import read_json
from gka.training.config import RunConfig

BOUNDS = (1, 3, 10, 30, 100, 300, 1000)  # of the histogram, in tokens
SAMPLE = 8192  # tokens that memory is told from
FORGETS = 1e-9  # the smallest log decay that is told apart from none


@dataclass(frozen=True, eq=False)
class Heads:
    """What layers gave the op: q, k, v [B,T,H,D] and g, alpha, beta [B,T,H].

    The heads of all layers follow each other.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor
    beta: Tensor

    def memory(self) -> Tensor:
        """Tokens after which a head's memory has faded to 1/e, by the median of its log decay [H], float32.

        Decays below FORGETS count as it.
        """
        return 1 / self.g.float().abs().flatten(0, 1).median(0).values.clamp(min=FORGETS)

    def chosen(self, heads: Tensor) -> "Heads":
        """Those heads alone, contiguous."""
        return Heads(**{name: x[:, :, heads].contiguous() for name, x in vars(self).items()})


@contextmanager
def watched() -> Iterator[list[dict[str, Tensor | None]]]:
    """What GKA layers give `chunk_gka` inside, call by call."""
    seen: list[dict[str, Tensor | None]] = []
    op = gated_kalmanet.chunk_gka

    def watching(*given: Any, beta: Tensor | None, **rest: Any) -> Any:
        q, k, v, g, _, alpha, *_ = given
        seen.append({"q": q, "k": k, "v": v, "g": g, "alpha": alpha, "beta": beta})
        return op(*given, beta=beta, **rest)

    with mock.patch.object(gated_kalmanet, "chunk_gka", watching):
        yield seen


def read(model: Any, rows: Tensor) -> Heads:
    """Heads of all GKA layers of a model that reads the rows [B,T].

    Raises:
        InputError: it has none, or they share key heads, lack a gate, or differ in size.
    """
    with torch.no_grad(), watched() as seen:
        model.model(input_ids=rows, use_cache=False)
    if not seen:
        raise InputError("the model has no GKA layer; expected one trained by the benchmark heads")
    shapes = {tuple(x.shape[2:]) for layer in seen for x in layer.values() if x is not None}
    if any(x is None for layer in seen for x in layer.values()) or len(shapes) != 2:
        raise InputError(
            "the model's GKA layers lack a gate, share key heads or differ in size; expected one trained by "
            "the benchmark heads"
        )
    return Heads(**{name: torch.cat([layer[name] for layer in seen], 2) for name in seen[0]})  # pyright: ignore[reportArgumentType, reportCallIssue]


def spread(memory: Tensor, count: int) -> Tensor:
    """Indices of `count` heads at equal distances in the order of memory [H]; int64 [count]."""
    place = (torch.arange(count, device=memory.device) + 0.5) * len(memory) / count
    return memory.argsort()[place.long()]


def histogram(memory: Tensor) -> list[int]:
    """Heads that remember fewer tokens than each bound and not fewer than the one before, then the rest."""
    bounds = torch.tensor(BOUNDS, dtype=memory.dtype, device=memory.device)
    found = torch.bucketize(memory, bounds, right=True)
    return torch.bincount(found, minlength=len(BOUNDS) + 1).tolist()


def head_of_histogram() -> list[str]:
    """Names of the histogram's columns, in tokens."""
    inner = [f"{a} to {b}" for a, b in itertools.pairwise(BOUNDS)]
    return [f"under {BOUNDS[0]}", *inner, f"{BOUNDS[-1]} and more"]


class TrainedHeads:
    """The inputs that the model of a finished run of `gka train` makes of its held-out text.

    Args:
        folder: of the run.
        device: of the tensors.

    Attributes:
        memory: tokens that every head remembers, [layers,heads], told from at most SAMPLE tokens.
        about: what results say of the model.

    Raises:
        InputError: there is no such run, or its model has no fitting layers.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from gka.checkpoints.open import load_gka, load_tokenizer_of
        from gka.training import folder as files

        metrics = folder / files.METRICS
        if not metrics.is_file():
            raise InputError(
                f"{folder} holds no finished run; train one: python -m benchmarks.run heads"
            )
        config = RunConfig.from_tables(read_json(metrics)["config"])
        self.device = device
        self.model: Any = load_gka(folder / files.MODEL, dtype="bfloat16", device=device).eval()
        self.ids = held_out(config, load_tokenizer_of(folder / files.MODEL))
        mixers = [layer.mixer for layer in self.model.model.layers]
        self.layers, self.dim = len(mixers), int(mixers[0].head_dim)
        sample = places(self.ids, 1, min(SAMPLE, len(self.ids)))[0].to(device)
        self.memory = read(self.model, sample).memory().cpu().view(self.layers, -1)
        self.about: dict[str, Any] = {
            "run": name_of(folder), "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": self.layers, "heads": self.memory.shape[1], "dim": self.dim,
            "steps": config.training.max_steps, "held_out_tokens": len(self.ids),
            "memory_tokens": self.memory.tolist(), "histogram": histogram(self.memory.flatten()),
        }  # fmt: skip

    def inputs(self, size: Size) -> Inputs:
        """Of `size.heads` heads, which read `size.batch` places of the text.

        q, k, v are bfloat16, gates float32, as in `registry.make_inputs`; so are `lamb` and `do`, which no
        model has.

        Raises:
            NotAvailable: the model's heads have another width, or are fewer.
            InputError: the text is too short.
        """
        there = self.memory.numel()
        if size.dim != self.dim or size.heads > there:
            raise NotAvailable(
                f"the trained model has {there} heads of {self.dim}; asked for {size.heads} of {size.dim}"
            )
        rows, _ = places(self.ids, size.batch, size.length)
        heads = read(self.model, rows.to(self.device))
        torch.manual_seed(0)
        do = torch.randn_like(heads.v[:, :, : size.heads]).bfloat16()
        lamb = 0.25 + torch.rand(size.heads, size.dim, device=self.device)
        x = heads.chosen(spread(self.memory.flatten(), size.heads).to(self.device))
        q, k, v = (y.bfloat16() for y in (x.q, x.k, x.v))
        g, alpha, beta = (y.float() for y in (x.g, x.alpha, x.beta))
        leaves = (q, k, v, g, alpha, beta, beta.bfloat16(), lamb)
        return Inputs(do, *(y.detach().requires_grad_() for y in leaves))

    def told(self) -> str:
        """How long the heads remember, in a line."""
        parts = zip(head_of_histogram(), self.about["histogram"], strict=True)
        text = ", ".join(f"{name}: {count}" for name, count in parts if count)
        return f"heads of the trained model by tokens that they remember: {text}"


def held_out(config: RunConfig, tokenizer: Any) -> Tensor:
    """Ids [tokens] of the run's text that it was not trained on."""
    from gka.data import find_documents, pack, split

    data = config.data
    packed = pack(find_documents(data.text, data.glob), tokenizer)
    ranges = split(packed, data.eval_fraction)[1].ranges
    return torch.cat([torch.from_numpy(packed.tokens[a:b].astype("int64")) for a, b in ranges])
