"""An MQAR sweep over mixers, sizes, tasks, learning rates and seeds: resumable, on several processes.

The result file is rewritten atomically after every finished cell. Cells found in it are not run
again; cells of other sweeps stay in it. `PRESETS` are sweeps by name.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from gka.errors import InputError
from gka.evaluation.mqar import MQARTask
from gka.evaluation.mqar_cell import Budget, Cell, layer_mixers, train_cell
from gka.evaluation.results import check_entries, environment, key_of, load_records, one_thread
from gka.storage import write_json


@dataclass(frozen=True)
class Sweep:
    """The comparison of every mixer, at every size, on every mixture.

    Each is trained at every learning rate with the first seed; the rate with the best validation
    accuracy is then repeated with the other seeds.

    Attributes:
        mixers: names of `gka.layers.MIXERS`, or two as in "gla+attention", one per layer.
        sizes: (width, head_dim) of the models.
        mixtures: the tasks that a model is trained and tested on, with its budget.
        learning_rates: the grid of every mixer.
        seeds: the first chooses the rate, the others repeat it; each below 1,000,000.

    Raises:
        InputError: something is empty, repeated or out of range; the message names it.
    """

    mixers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    mixtures: tuple[tuple[tuple[MQARTask, ...], Budget], ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        check_entries(**vars(self))
        if min(map(min, self.sizes)) < 1:
            raise InputError(f"sizes holds {min(map(min, self.sizes))}; expected 1 or more")
        if not all(tasks for tasks, _ in self.mixtures):
            raise InputError("mixtures holds one without tasks; expected one task or more in each")
        if min(self.learning_rates) <= 0:
            raise InputError(f"learning_rates holds {min(self.learning_rates)}; expected above 0")
        if not 0 <= min(self.seeds) <= max(self.seeds) < 1_000_000:
            raise InputError(f"seeds is {self.seeds}; expected numbers from 0 to 999999")
        _check_mixers(self.mixers)

    def __len__(self) -> int:
        """Number of trainings."""
        groups = len(self.mixers) * len(self.sizes) * len(self.mixtures)
        return groups * (len(self.learning_rates) + len(self.seeds) - 1)

    def search(self) -> list[Cell]:
        """Every learning rate with the first seed."""
        return [
            Cell(mixer, width, head_dim, tasks, rate, self.seeds[0], budget)
            for (tasks, budget), (width, head_dim), rate, mixer in product(
                self.mixtures, self.sizes, self.learning_rates, self.mixers
            )
        ]

    def repeats(self, records: Mapping[str, dict[str, Any]]) -> list[Cell]:
        """The other seeds at the best rate, according to the search's `records`."""
        searched = [records[key_of(cell.describe())] for cell in self.search()]
        best = {_group(record["cell"]): record for record in _best_records(searched)}
        return [
            replace(cell, seed=seed)
            for seed, cell in product(self.seeds[1:], self.search())
            if best[_group(cell.describe())]["cell"]["learning_rate"] == cell.learning_rate
        ]


def _check_mixers(mixers: Sequence[str]) -> None:
    from gka.layers import MIXERS

    for name in mixers:
        parts = layer_mixers(name)
        if len(parts) != 2 or not set(parts) <= MIXERS.keys():
            raise InputError(
                f"mixers holds {name!r}; expected names among {', '.join(MIXERS)},"
                " or two of them as in gla+attention"
            )


def run_sweep(
    sweep: Sweep,
    result_file: Path,
    *,
    processes: int = 1,
    device: str = "cpu",
    on_cell: Callable[[Cell, dict[str, Any]], None] = lambda cell, result: None,
) -> dict[str, Any]:
    """Run the cells that `result_file` does not hold yet, and summarize those of the sweep.

    Args:
        sweep: the comparison.
        result_file: JSON, created if missing and rewritten atomically after each cell.
        processes: cells trained at the same time, each on one CPU thread.
        device: device of the training.
        on_cell: called after each finished cell, and first for those found in `result_file`.

    Returns:
        The content of the result file: "cells" (all finished ones), "summary" (see `summarize`),
        "environment".

    Raises:
        InputError: `processes` < 1, or the result file is not that of a sweep.
        concurrent.futures.process.BrokenProcessPool: a process was killed; finished cells are kept.
    """
    if processes < 1:
        raise InputError(f"processes is {processes}; expected 1 or more")
    records = load_records(result_file, "an MQAR sweep")

    def run(cells: list[Cell]) -> list[dict[str, Any]]:
        for cell in cells:
            if (key := key_of(cell.describe())) in records:
                on_cell(cell, records[key]["result"])
        todo = [cell for cell in cells if key_of(cell.describe()) not in records]
        for cell, result in _train_all(todo, processes, device):
            records[key_of(cell.describe())] = {"cell": cell.describe(), "result": result}
            write_json(result_file, {"environment": environment(), "cells": list(records.values())})
            on_cell(cell, result)
        return [records[key_of(cell.describe())] for cell in cells]

    found = run(sweep.search())
    found += run(sweep.repeats(records))
    content = {
        "environment": environment() | {"processes": processes, "device": device},
        "summary": summarize(found),
        "cells": list(records.values()),
    }
    write_json(result_file, content)
    return content


def _train_all(
    cells: list[Cell], processes: int, device: str
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train the cells; yields each with its result as it finishes."""
    if processes == 1 or len(cells) <= 1:
        for cell in cells:
            with one_thread():
                result = train_cell(cell, device)
            yield cell, result
        return
    before = set(multiprocessing.active_children())
    # spawn, not fork: a forked child of a process that has used torch's threads can hang
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(cells)), spawn, torch.set_num_threads, (1,))
    try:
        running = {pool.submit(train_cell, cell, device): cell for cell in cells}
        for future in as_completed(running):
            yield running[future], future.result()
    except BaseException:
        # Interrupted: end running cells now instead of waiting minutes for them.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def summarize(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per (tasks, size, mixer): the best learning rate, and its test accuracies over seeds.

    The validation accuracy (mean over tasks) of the first record's seed chooses the rate; the reported
    accuracies are those of the test set. `at_edge`: the best rate is the lowest or highest of at least three
    and a task's mean test accuracy is below 0.99, so a wider grid might do better. `curves` are those of
    `train_cell`, one per seed.
    """
    first = records[0]["cell"]["seed"]
    best = _best_records([r for r in records if r["cell"]["seed"] == first])
    return [
        _summarize_group(
            record, [r for r in records if _group(r["cell"]) == _group(record["cell"])]
        )
        for record in best
    ]


def _best_records(searched: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record with the best mean validation accuracy of every group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in searched:
        groups.setdefault(_group(record["cell"]), []).append(record)
    return [max(group, key=_validation_mean) for group in groups.values()]


def _summarize_group(best: dict[str, Any], group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rate, first = best["cell"]["learning_rate"], best["cell"]["seed"]
    tried = {
        r["cell"]["learning_rate"]: _validation_mean(r) for r in group if r["cell"]["seed"] == first
    }
    at_rate = [r for r in group if r["cell"]["learning_rate"] == rate]
    accuracies = [r["result"]["test_accuracy"] for r in at_rate]
    per_task = [_spread(list(values)) for values in zip(*accuracies, strict=True)]
    solved = all(task["mean"] >= 0.99 for task in per_task)
    return {
        **{name: best["cell"][name] for name in ("mixer", "width", "head_dim", "tasks")},
        "parameters": best["result"]["parameters"],
        "learning_rate": rate,
        "at_edge": len(tried) >= 3 and rate in (min(tried), max(tried)) and not solved,
        "seeds": [r["cell"]["seed"] for r in at_rate],
        "test_accuracy": per_task,
        "curves": [r["result"]["curve"] for r in at_rate],
        "validation_by_rate": {f"{rate:g}": score for rate, score in tried.items()},
    }


def _validation_mean(record: dict[str, Any]) -> float:
    return mean(record["result"]["validation_accuracy"])


def _group(cell: dict[str, Any]) -> str:
    """Key of a cell's group: everything but the learning rate and the seed."""
    return key_of({k: v for k, v in cell.items() if k not in ("learning_rate", "seed")})


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": mean(values),
        "stdev": stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "by_seed": values,
    }


# "gla+attention": GLA's convolutions serve attention, which has none and alone does not learn in time.
_COMPARED = ("gka", "gla", "deltanet", "gated_deltanet", "attention", "gla+attention")


def _zoology_budget(batch_size: int, epochs: int) -> Budget:
    """Zoology's: 100,000 training and 3000 test examples, weight decay 0.1, stop at accuracy 0.99."""
    epoch = 100_000 // batch_size
    return Budget(
        steps=epochs * epoch,
        batch_size=batch_size,
        train_examples=100_000,
        validation_examples=1000,
        test_examples=3000,
        evaluate_every=epoch,
    )


def _tasks(vocab_size: int, *pairs_and_lengths: tuple[int, int]) -> tuple[MQARTask, ...]:
    return tuple(MQARTask(vocab_size, pairs, length) for pairs, length in pairs_and_lengths)


PRESETS: dict[str, Sweep] = {
    # Minutes on two CPU cores: as many pairs as the memory has columns.
    "cpu": Sweep(
        mixers=_COMPARED,
        sizes=((16, 16),),
        mixtures=(
            (
                _tasks(128, (16, 64)),
                Budget(steps=1500, batch_size=32, train_examples=48_000),
            ),
        ),
        learning_rates=(5e-3, 1e-2, 2e-2),
        seeds=(0, 1, 2),
    ),
    # Hours on one GPU: Zoology's vocabulary, up to four times as many pairs as the memory has columns.
    "gpu": Sweep(
        mixers=_COMPARED,
        sizes=((64, 32), (64, 64)),
        mixtures=(
            (_tasks(8192, (16, 256), (32, 256), (64, 256)), _zoology_budget(256, 16)),
            (_tasks(8192, (32, 512), (64, 512), (128, 512)), _zoology_budget(128, 16)),
        ),
        learning_rates=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1, 2),
    ),
    # Figure 2 of the Zoology paper but for width 512: its rates and batch sizes, 64 epochs, one task a model.
    "zoology": Sweep(
        mixers=_COMPARED,
        sizes=((64, 64), (128, 128), (256, 256)),
        mixtures=(
            (_tasks(8192, (4, 64)), _zoology_budget(512, 64)),
            (_tasks(8192, (8, 128)), _zoology_budget(512, 64)),
            (_tasks(8192, (16, 256)), _zoology_budget(256, 64)),
            (_tasks(8192, (64, 512)), _zoology_budget(128, 64)),
        ),
        learning_rates=(1e-4, 4.6416e-4, 2.1544e-3, 1e-2),
        seeds=(0,),
    ),
}
