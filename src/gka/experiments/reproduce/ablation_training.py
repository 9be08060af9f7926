"""Trains a decoder of `ablations` on bytes: a whole step is one CUDA graph, and nothing waits for the device.

A step (batch, forward, backward, clipping, AdamW) of a small model is some thousand short kernels, which the
host launches more slowly than the card runs them. The graph is recorded without torch.compile, whose first
step would take longer than a cell.
"""

import hashlib
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gka.evaluation.repeats import gaps
from gka.layers import parameter_groups

EAGER_STEPS = 3  # before the graph is recorded: kernels are compiled, optimizer states made
WINDOW = 8  # steps between two times
NGRAM = 8  # bytes, the predicted one among them, that occurred before: "seen"
HELD_OUT = 50  # of so many documents one
END = 256


@dataclass(frozen=True)
class Budget:
    """What every model of a size is trained on.

    Attributes:
        length: bytes of a sequence. batch: sequences of a step. steps: optimizer steps.
        rate: AdamW's highest rate, after a linear warm-up over `warmup` of the steps; then a cosine to zero.
        held_out: sequences of the evaluation. documents: of the corpus; 0: all.
    """

    length: int
    batch: int
    steps: int
    rate: float
    held_out: int
    documents: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def factor(self, step: int) -> float:
        """Share of `rate` in a step."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1.0, self.steps - rising)))


@lru_cache(maxsize=1)
def corpus(length: int, documents: int) -> tuple[Tensor, Tensor, str]:
    """Python sources as bytes, END behind each document: training and held-out sequences int16 [N,length].

    Documents are those of the standard library in the order of a hash of their names; every fiftieth is held
    out.

    Args:
        documents: how many, 0 for all.

    Returns:
        Both parts, and the SHA-256 of all tokens.
    """
    from gka.data import standard_library

    found = sorted(standard_library(), key=lambda d: hashlib.sha256(d.name.encode()).digest())
    found = found[:documents] if documents else found
    ends, parts = np.array([END], np.int16), [[], []]
    for number, document in enumerate(found):
        read = np.frombuffer(document.path.read_bytes(), np.uint8).astype(np.int16)
        parts[number % HELD_OUT == 0] += [read, ends]
    joined = [np.concatenate(part) for part in parts]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in joined)).hexdigest()
    blocks = [
        torch.from_numpy(part[: len(part) // length * length]).view(-1, length) for part in joined
    ]
    return blocks[0], blocks[1], digest


def seen_before(ids: Tensor) -> Tensor:
    """Where a byte completes an n-gram of NGRAM bytes that its sequence had before, bool like ids [N,T]."""
    return torch.from_numpy(gaps(ids.numpy(), NGRAM) > 0)


class Trainer:
    """A model with optimizer, data and the counter of its steps on one device.

    Attributes:
        taken: steps queued so far.
        graph: the recorded step, None before and on a CPU.
        why_eager: why no graph could be recorded, None if it could.
    """

    def __init__(self, model: Any, budget: Budget, seed: int, device: str) -> None:
        self.model, self.budget, self.device = model.to(device).train(), budget, device
        self.on_gpu = torch.device(device).type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self.graph, self.why_eager, self.taken = None, None, 0
        blocks, _, _ = self.corpus = corpus(budget.length, budget.documents)
        self.data: Tensor = blocks.to(device)
        self.order = _order(len(blocks), budget, seed).to(device)
        factors = [budget.factor(step) for step in range(budget.steps)]
        self.rates = budget.rate * torch.tensor(factors, device=device)
        self.rate = torch.zeros((), device=device)
        self.losses, self.norms = (torch.zeros(budget.steps, device=device) for _ in range(2))
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, budget.weight_decay), lr=self.rate, betas=(0.9, 0.95), fused=True,
            capturable=self.on_gpu,
        )  # fmt: skip

    def run(self) -> list[float]:
        """All steps; seconds of a step, by windows of WINDOW steps."""
        if self.on_gpu:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.on_gpu else nullcontext():
            marks = [self._mark()]
            while self.taken < self.budget.steps:
                self._advance()
                if self.taken % WINDOW == 0:
                    marks.append(self._mark())
        if not self.on_gpu:
            return [(b - a) / WINDOW for a, b in pairwise(marks)]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 / WINDOW for a, b in pairwise(marks)]

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _advance(self) -> None:
        if self.on_gpu and self.taken == EAGER_STEPS:
            self._record()
        self._step() if self.graph is None else self.graph.replay()
        self.taken += 1

    def _record(self) -> None:
        """Record the step, or note why it cannot be; recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._step()
        except RuntimeError as error:
            self.why_eager = (str(error).splitlines() or [""])[0]
            torch.cuda.synchronize(self.device)
        else:
            self.graph = graph

    def _step(self) -> None:
        """One optimizer step; reads nothing from the device."""
        rows = self.order.index_select(0, self.counter).squeeze(0)
        ids = self.data.index_select(0, rows).long()
        self.rate.copy_(self.rates.index_select(0, self.counter).squeeze(0))
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.budget.max_grad_norm)
        self.optimizer.step()
        self.losses.index_copy_(0, self.counter, loss.detach().float().view(1))
        self.norms.index_copy_(0, self.counter, norm.detach().float().view(1))
        self.counter.add_(1)

    def precision(self) -> AbstractContextManager:
        """bfloat16 products on a GPU, float32 on a CPU."""
        if not self.on_gpu:
            return nullcontext()
        # casts are part of every replay: none may be kept from an earlier step
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Mean nats a byte of held-out sequences: all bytes, those seen before there, the rest."""
        blocks = self.corpus[1][: self.budget.held_out]
        parts = []
        for some in blocks.split(self.budget.batch):
            ids = some.to(self.device).long()
            with self.precision():
                logits = self.model(input_ids=ids).logits[:, :-1]
            parts.append(cross_entropy(logits.float().mT, ids[:, 1:], reduction="none").cpu())
        losses, seen = torch.cat(parts).double(), _seen(self.budget)[:, 1:]
        return {
            "loss": losses.mean().item(),
            "seen": losses[seen].mean().item(),
            "new": losses[~seen].mean().item(),
        }


@lru_cache(maxsize=1)
def _seen(budget: Budget) -> Tensor:
    return seen_before(corpus(budget.length, budget.documents)[1][: budget.held_out])


def _order(blocks: int, budget: Budget, seed: int) -> Tensor:
    """Rows of every step's batch, int64 [steps,batch]: shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    wanted = budget.steps * budget.batch
    epochs = [torch.randperm(blocks, generator=generator) for _ in range(-(-wanted // blocks))]
    return torch.cat(epochs)[:wanted].view(budget.steps, budget.batch)


def train(trainer: Trainer) -> dict[str, Any]:
    """Train to the end; curves of loss and gradient norm (before clipping), and times.

    A loss or norm that is not finite ends nothing: all that follows is not finite either, and stands as None.
    """
    seconds = trainer.run()
    losses, norms = trainer.losses.tolist(), trainer.norms.tolist()
    finite = [math.isfinite(x) and math.isfinite(y) for x, y in zip(losses, norms, strict=True)]
    steady = seconds[1:] or seconds  # the first window compiles and records
    return {
        "diverged": None if all(finite) else finite.index(False),
        "losses": [_short(x) for x in losses],
        "norms": [_short(x) for x in norms],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "ms": round(1e3 * median(steady), 3) if steady else None,
        "graph": trainer.graph is not None,
        "why_eager": trainer.why_eager,
    }


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
