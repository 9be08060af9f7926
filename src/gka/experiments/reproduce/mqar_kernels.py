"""Compiles the kernels of `mqar` ahead of their use, in processes of their own.

While a kernel is compiled, the process that asks for it queues no work, and all models of the card wait. Here
a process a mixer takes a step of each width in turn; Triton keeps what it compiles on disk, where trainings
find it. A training that comes first compiles for itself. Layers of flash-linear-attention are left out: they
tune their kernels on the card for minutes, and a card that is shared by processes takes turns.
"""

import contextlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from gka.evaluation.mqar import MQARTask
from gka.evaluation.mqar_cell import Budget
from gka.experiments.reproduce import mqar_models
from gka.experiments.reproduce.mqar_models import Model
from gka.experiments.reproduce.mqar_training import Trainer, Training


@lru_cache(maxsize=1)  # once a process
def compile_ahead(task: MQARTask, budget: Budget, models: tuple[Model, ...], device: str) -> None:
    """Begin to compile the models' kernels, in their order, and return at once."""
    if torch.device(device).type != "cuda":
        return
    spawn = multiprocessing.get_context("spawn")
    mixers = dict.fromkeys(m.mixer for m in models if mqar_models.MIXERS[m.mixer].compiles)
    for mixer in mixers:
        mine = tuple(model for model in models if model.mixer == mixer)
        spawn.Process(target=first_steps, args=(task, budget, mine, device), daemon=True).start()


def first_steps(task: MQARTask, budget: Budget, models: Sequence[Model], device: str) -> None:
    """A step of each model. One that fails is left to the cell that trains it, which records the reason."""
    small = replace(budget, train_examples=budget.batch_size)
    for model in models:
        with contextlib.suppress(Exception):
            built = mqar_models.build(model, task, device)
            trainer = Trainer(built, Training(task, 1e-3, 0, small), device)
            trainer.advance(1)
            trainer.measure(trainer.data)
