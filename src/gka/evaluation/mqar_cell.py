"""One cell of an MQAR sweep: train a small model on a mixture of tasks and measure it on each."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gka.errors import InputError
from gka.evaluation.mqar import IGNORE, MQARTask

if TYPE_CHECKING:
    from gka.models import GKAForCausalLM

Examples = tuple[Tensor, Tensor]
"""Inputs and labels, both int64 [examples, input_seq_len]."""

# Differ from the seed of every training set: seeds of cells are below 1,000,000.
_VALIDATION_SEED = 1_000_000
_TEST_SEED = 2_000_000

# Examples per forward pass in a measurement.
_READ_BATCH = 256


@dataclass(frozen=True)
class Budget:
    """Length and data of a training, the same for every mixer of a sweep.

    Attributes:
        steps: optimizer steps at most.
        batch_size: examples per step.
        train_examples: size of a task's training set, read in shuffled epochs.
        validation_examples, test_examples: sizes of a task's two held-out sets.
        weight_decay: AdamW's, on matrices, embeddings and convolutions (not on norms, decay, biases).
        warmup: fraction of the steps over which the learning rate rises; then a cosine to zero.
        max_grad_norm: norm to which gradients are clipped.
        evaluate_every: steps between measurements of the validation accuracy.
        stop_accuracy: training ends early once the validation accuracy on every task reaches this.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    steps: int
    batch_size: int = 64
    train_examples: int = 64_000
    validation_examples: int = 500
    test_examples: int = 1000
    weight_decay: float = 0.1
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    evaluate_every: int = 100
    stop_accuracy: float = 0.99

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "train_examples", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.train_examples < self.batch_size:
            raise InputError(
                f"train_examples is {self.train_examples}; expected batch_size ="
                f" {self.batch_size} or more"
            )


@dataclass(frozen=True)
class Cell:
    """Everything that determines one training run; equal cells give equal results.

    Attributes:
        mixer: a name of `gka.layers.MIXERS` for both layers, or one for each as in "gla+attention".
        width: hidden size of the two-layer model.
        head_dim: size of keys and values of its one head; a recurrent memory is head_dim x head_dim.
        tasks: the tasks; training batches come from each in turn.
        learning_rate: AdamW's peak rate.
        seed: of the weights, the training sets and the order of their examples.
        budget: length and data of the training.
    """

    mixer: str
    width: int
    head_dim: int
    tasks: tuple[MQARTask, ...]
    learning_rate: float
    seed: int
    budget: Budget

    def describe(self) -> dict[str, Any]:
        """The cell as JSON-ready data: equal exactly for equal cells."""
        return asdict(self)

    def __str__(self) -> str:
        pairs = "/".join(str(task.num_kv_pairs) for task in self.tasks)
        return (
            f"{self.mixer}, width {self.width}, head {self.head_dim}, {pairs} pairs,"
            f" rate {self.learning_rate:g}, seed {self.seed}"
        )


def layer_mixers(mixer: str) -> list[str]:
    """Mixers of the two layers: ["gla", "attention"] of "gla+attention", ["gka", "gka"] of "gka"."""
    names = mixer.split("+")
    return names if len(names) == 2 else names * 2


def build_model(cell: Cell) -> "GKAForCausalLM":
    """The cell's two-layer model with weights from torch's global generator.

    It has one head, expand_v = 1, an MLP of twice the width and untied embeddings. Entries of embeddings have
    standard deviation 1 and those of matrices 1/sqrt(width), so that at first tokens dominate the residual
    stream, not random mixers' outputs. With the 0.02 of large language models, models of this width take
    thousands of steps before they learn.
    """
    from gka.models import GKAConfig, GKAForCausalLM

    config = GKAConfig(
        vocab_size=max(task.vocab_size for task in cell.tasks),
        hidden_size=cell.width,
        intermediate_size=2 * cell.width,
        mixers=layer_mixers(cell.mixer),
        num_heads=1,
        head_dim=cell.head_dim,
        expand_v=1.0,
        attention_num_heads=1,
        attention_head_dim=cell.head_dim,
        max_position_embeddings=max(task.input_seq_len for task in cell.tasks),
        initializer_range=cell.width**-0.5,
        use_cache=False,
    )
    model = GKAForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight)
    return model


def train_cell(cell: Cell, device: str = "cpu") -> dict[str, Any]:
    """Train the cell's model and measure it.

    Args:
        cell: the model and its training.
        device: "cpu", "cuda", "cuda:1", ...

    Returns:
        JSON-ready dict: test_accuracy and validation_accuracy (fraction of queries answered right at the
        end, one number per task), steps taken, diverged (the loss became infinite or NaN; accuracies are
        then 0), curve (rows of step, training loss, mean validation accuracy), parameters, seconds.
    """
    started = time.perf_counter()
    budget, tasks = cell.budget, cell.tasks
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        model = build_model(cell)
    model.to(device)  # type: ignore[arg-type]
    train = [_on(device, task.sample(budget.train_examples, cell.seed)) for task in tasks]
    validation = [
        _on(device, t.sample(budget.validation_examples, _VALIDATION_SEED)) for t in tasks
    ]
    test = [_on(device, task.sample(budget.test_examples, _TEST_SEED)) for task in tasks]

    curve = _train(model, train, validation, cell)
    diverged = not math.isfinite(curve[-1][1])
    return {
        "test_accuracy": [0.0 if diverged else accuracy(model, *examples) for examples in test],
        "validation_accuracy": [0.0] * len(tasks)
        if diverged
        else [accuracy(model, *examples) for examples in validation],
        "steps": curve[-1][0],
        "diverged": diverged,
        "curve": [row for row in curve if math.isfinite(row[1])],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _train(
    model: "GKAForCausalLM", train: list[Examples], validation: list[Examples], cell: Cell
) -> list[tuple[int, float, float]]:
    """Train and return the curve; its last row is the last step, with a loss not finite after divergence."""
    budget = cell.budget
    optimizer = _optimizer(model, cell.learning_rate, budget.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, budget)
    )
    curve: list[tuple[int, float, float]] = []
    for step, (task, rows) in enumerate(_batches(len(train), budget, cell.seed), start=1):
        loss = query_loss(model, train[task][0][rows], train[task][1][rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), budget.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % budget.evaluate_every == 0 or step == budget.steps:
            accuracies = [accuracy(model, *examples) for examples in validation]
            curve.append((step, round(loss.item(), 5), sum(accuracies) / len(accuracies)))
            if not math.isfinite(curve[-1][1]) or min(accuracies) >= budget.stop_accuracy:
                break
    return curve


def query_loss(model: "GKAForCausalLM", inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the queries of int64 [B,T] inputs and labels: a scalar."""
    return cross_entropy(_query_logits(model, inputs, labels), labels[labels != IGNORE])


@torch.no_grad()
def accuracy(model: "GKAForCausalLM", inputs: Tensor, labels: Tensor) -> float:
    """Fraction of the queries of int64 [B,T] inputs and labels whose most likely token is the label."""
    model.eval()
    right = total = 0
    batches = zip(inputs.split(_READ_BATCH), labels.split(_READ_BATCH), strict=True)
    for some_inputs, some_labels in batches:
        answers = _query_logits(model, some_inputs, some_labels).argmax(-1)
        asked = some_labels[some_labels != IGNORE]
        right += int((answers == asked).sum())
        total += asked.numel()
    model.train()
    return right / total


def _query_logits(model: "GKAForCausalLM", inputs: Tensor, labels: Tensor) -> Tensor:
    """Logits [queries, vocab_size]; no other positions are projected."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[labels != IGNORE])


def _optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def learning_rate_factor(step: int, budget: Budget) -> float:
    """Linear warm-up, then a cosine to zero at `budget.steps`."""
    rising = budget.warmup * budget.steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, budget.steps - rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _batches(num_tasks: int, budget: Budget, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(task, rows of its training set) of each of `budget.steps` batches, tasks in turn."""
    streams = [_rows(budget, seed + task) for task in range(num_tasks)]
    for step in range(budget.steps):
        yield step % num_tasks, next(streams[step % num_tasks])


def _rows(budget: Budget, seed: int) -> Iterator[Tensor]:
    """Endless full batches, from a new permutation of the training set in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(budget.train_examples, generator=generator)
        yield from order[: len(order) // budget.batch_size * budget.batch_size].split(
            budget.batch_size
        )


def _on(device: str, examples: Examples) -> Examples:
    return examples[0].to(device), examples[1].to(device)
