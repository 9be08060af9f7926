"""Trains a model of `mqar` in turns, so that many tiny models share one card.

A step of such a model is some hundred short kernels, for which the host is too slow and which leave the card
idle. So a whole step (batch, forward, backward, clipping, AdamW) is one CUDA graph, and several models run
side by side, each on a stream of its own. They are in one process: without NVIDIA's MPS kernels of different
processes do not overlap, each process would compile or load them again, and one ledger has one writer.
Batching the models by torch.func needs the layers' kernels under vmap, which they refuse.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gka.evaluation.mqar import IGNORE, MQARTask
from gka.evaluation.mqar_cell import Budget, learning_rate_factor
from gka.experiments.reproduce.experiment import Turns
from gka.layers import parameter_groups

EAGER_STEPS = 3  # before a graph is captured: kernels are compiled, optimizer states created
TURN = 20  # steps of a turn
_VALIDATION_SEED, _TEST_SEED = 1_000_000, 2_000_000  # those of training are below


@dataclass(frozen=True)
class Training:
    """What is trained besides the model.

    Attributes:
        task: drawn from for training, validation and test.
        rate: AdamW's highest.
        seed: of weights, examples and their order.
        budget: steps, batch, examples; `stop_accuracy` on validation ends the training.
    """

    task: MQARTask
    rate: float
    seed: int
    budget: Budget


@dataclass(frozen=True)
class Examples:
    """inputs [N,T] int64, and the N x pairs queries: their places and answers, both int64 [N,pairs]."""

    inputs: Tensor
    places: Tensor
    answers: Tensor

    def rows(self, rows: Tensor) -> "Examples":
        """Those of int64 [n]."""
        parts = (self.inputs, self.places, self.answers)
        return Examples(*(x.index_select(0, rows) for x in parts))


@lru_cache(maxsize=8)  # models of one seed and task share them
def examples(task: MQARTask, count: int, seed: int, device: str) -> Examples:
    """Examples on the device, equal for equal arguments."""
    inputs, labels = task.sample(count, seed, device)
    places = (labels != IGNORE).nonzero()[:, 1].view(count, task.num_kv_pairs)
    return Examples(inputs, places, labels.gather(1, places))


def query_logits(model: Any, batch: Examples) -> Tensor:
    """Logits [n x pairs, vocabulary] at the queries alone."""
    hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state
    asked = hidden.gather(1, batch.places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return model.lm_head(asked.flatten(0, 1))


class Trainer:
    """A model with its optimizer, data and the counter of its steps, all on one device.

    A step reads batch and rate by the counter, so that it is the same work every time and fits a CUDA graph.

    Args:
        model: a `GKAForCausalLM` on the device.
        training: its data and budget.
        device: "cpu", "cuda", ...
        capture: whether a GPU replays a captured step.

    Attributes:
        taken: steps queued so far.
        graph: the captured step; None on a CPU, and for the first steps on a GPU.
    """

    def __init__(self, model: Any, training: Training, device: str, capture: bool = True) -> None:
        self.model, self.training, self.device = model.train(), training, device
        budget = training.budget
        self.on_gpu = torch.device(device).type == "cuda"
        self.captures = capture and self.on_gpu
        self.stream: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self.graph: Any = None
        self.taken = 0
        self.data = examples(training.task, budget.train_examples, training.seed, device)
        self.order = _order(budget, training.seed, device)
        factors = [learning_rate_factor(step, budget) for step in range(budget.steps)]
        self.rates = training.rate * torch.tensor(factors, device=device)
        self.rate = torch.zeros((), device=device)
        self.losses = torch.zeros(budget.steps, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, budget.weight_decay), lr=self.rate, betas=(0.9, 0.95), fused=True,
            capturable=self.on_gpu,
        )  # fmt: skip
        if self.on_gpu:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def own_stream(self) -> AbstractContextManager:
        """The model's stream as the current one."""
        return torch.cuda.stream(self.stream) if self.on_gpu else nullcontext()

    def advance(self, steps: int) -> None:
        """Queue the next steps."""
        with self.own_stream():
            for _ in range(steps):
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
                self.taken += 1
                if self.captures and self.taken == EAGER_STEPS:
                    self._capture()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # other models' work may be running; the default mode would forbid it calls that capture none of it
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._step()
        self.graph = graph

    def _step(self) -> None:
        """One optimizer step; reads nothing from the device."""
        batch = self.data.rows(self.order.index_select(0, self.counter).squeeze(0))
        self.rate.copy_(self.rates.index_select(0, self.counter).squeeze(0))
        with self._precision():
            loss = cross_entropy(query_logits(self.model, batch).float(), batch.answers.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.budget.max_grad_norm)
        self.optimizer.step()
        self.losses.index_copy_(0, self.counter, loss.detach().view(1))
        self.counter.add_(1)

    def _precision(self) -> AbstractContextManager:
        """bfloat16 products on a GPU, as its kernels take them; float32 on a CPU."""
        if not self.on_gpu:
            return nullcontext()
        # casts are part of every replay: none may be kept from an earlier step
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)

    @torch.no_grad()
    def measure(self, held: Examples) -> Tensor:
        """Queue: (right answers, last loss) as float32 [2], on its way to the host."""
        if self.on_gpu:  # the examples may have been drawn just now, on another stream
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.own_stream():
            right = torch.zeros((), device=self.device)
            size = self.training.budget.batch_size  # that of training: no kernel is compiled again
            for rows in torch.arange(len(held.inputs), device=self.device).split(size):
                batch = held.rows(rows)
                with self._precision():
                    answers = query_logits(self.model, batch).argmax(-1)
                right += (answers == batch.answers.flatten()).sum()
            last = self.losses.index_select(0, self.counter - 1).squeeze(0)
            return torch.stack([right, last]).to("cpu", non_blocking=True)

    def finished(self) -> Any:
        """An event that is over when everything queued so far is; None on a CPU."""
        return self.stream.record_event() if self.on_gpu else None


def _order(budget: Budget, seed: int, device: str) -> Tensor:
    """Rows of every step's batch, int64 [steps, batch_size]: full batches of shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = budget.train_examples // budget.batch_size
    epochs = [
        torch.randperm(budget.train_examples, generator=generator)[: per_epoch * budget.batch_size]
        for _ in range(-(-budget.steps // per_epoch))
    ]
    return torch.cat(epochs).view(-1, budget.batch_size)[: budget.steps].to(device)


def _share(trainer: Trainer, held: Examples) -> Generator[bool, None, tuple[float, float]]:
    """Turns that return (share of right answers, last loss)."""
    found, over = trainer.measure(held), trainer.finished()
    while over is not None and not over.query():
        yield False
    right, loss = found.tolist()
    return right / held.answers.numel(), loss


def train(model: Any, training: Training, device: str) -> Turns:
    """Train to the end of the budget, or until validation is solved, in turns.

    Returns:
        A generator of turns that returns validation and test accuracy (of the queries), steps,
        diverged (the loss was not finite; accuracies are then 0), curve (step, loss, validation accuracy),
        parameters, and whether steps were replays of a CUDA graph.
    """
    trainer, budget = Trainer(model, training, device), training.budget
    held = examples(training.task, budget.validation_examples, _VALIDATION_SEED, device)
    curve: list[tuple[int, float, float]] = []
    diverged, accuracy = False, 0.0
    while trainer.taken < budget.steps and accuracy < budget.stop_accuracy and not diverged:
        until = min(trainer.taken + budget.evaluate_every, budget.steps)
        while trainer.taken < until:
            trainer.advance(min(TURN, until - trainer.taken))
            yield True
        accuracy, loss = yield from _share(trainer, held)
        diverged = not isfinite(loss)
        if not diverged:
            curve.append((trainer.taken, round(loss, 4), round(accuracy, 4)))
    test = 0.0
    if not diverged:
        unseen = examples(training.task, budget.test_examples, _TEST_SEED, device)
        test, _ = yield from _share(trainer, unseen)
    return {
        "validation": 0.0 if diverged else accuracy,
        "test": test,
        "steps": trainer.taken,
        "diverged": diverged,
        "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
        "graph": trainer.graph is not None,
    }
