"""Equal budgets of `language`, its statements, and cells that several processes measure."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gka.data import byte_tokenizer
from gka.experiments.corpora.build import Budget, build
from gka.experiments.reproduce.experiment import Cell, Options
from gka.experiments.reproduce.language import HYBRIDS, LANGUAGE, PURE, SIZES
from gka.experiments.reproduce.language_table import checks, rise
from gka.experiments.reproduce.language_training import (
    _steps,
    _told,
    configuration,
    parameters,
    pattern,
    training_rows,
)
from gka.experiments.reproduce.processes import measure_all, shares


@pytest.mark.parametrize("size", ["quick", "full"])
def test_models_have_equal_budgets(size: str) -> None:
    """Parameters within 2 % of GKA's for every mixer and hybrid."""
    training, tokenizer = SIZES[size].small, byte_tokenizer()
    counts = [parameters(configuration(m, training, tokenizer)) for m in (*PURE, *HYBRIDS)]
    assert max(counts) < 1.02 * counts[0] and min(counts) > 0.98 * counts[0]


def test_large_models_have_100_million_parameters() -> None:
    """The pair of the full form."""
    large = SIZES["full"].large
    assert large is not None
    assert parameters(configuration("gka", large, byte_tokenizer())) > 1e8


def test_hybrids_have_attention_in_every_fourth_layer() -> None:
    """And in the last one."""
    assert pattern("gla", 8) == ["gla"] * 8
    assert [i for i, m in enumerate(pattern("gla+attention", 8)) if m == "attention"] == [3, 7]
    assert pattern("gka+attention", 2) == ["gka", "attention"]


def test_tokens_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """All mixers of a seed read the same tokens in the same order."""
    small = Budget(60_000, 60_000, 0, 0, 0, 30_000, 8000, 300, 30_000, distributions=False)
    folder = build(tmp_path / "corpus", small).folder
    training = replace(SIZES["smoke"].small, length=32, steps=3)
    rows = training_rows(folder, training, 0)
    assert rows.shape == (6, 32)
    training_rows.cache_clear()
    assert np.array_equal(training_rows(folder, training, 0), rows)
    assert not np.array_equal(training_rows(folder, training, 1), rows)


class Broken(nn.Module):
    """A weight whose gradient is NaN in one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.ones(2, 2)), step
        self.seen: list[float] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        self.seen.append(float(self.weight.detach().sum()))
        self.left -= 1
        loss = self.weight.sum() * (float("nan") if self.left == -1 else 1.0)
        return SimpleNamespace(loss=loss)


def test_a_step_without_finite_gradients_changes_nothing() -> None:
    """It is skipped and told; the steps after it go on."""
    training = replace(SIZES["smoke"].small, steps=4, batch=1)
    model = Broken(1)
    losses, skipped, _ = _steps(model, torch.zeros(4, 8), training, "cpu")
    assert skipped == [1] and bool(losses[1].isnan()) and bool(losses[2].isfinite())
    assert model.seen[0] > model.seen[1] == model.seen[2] > model.seen[3]
    assert _told(skipped, losses).endswith("at first those of step 1 (loss nan), loss before 4.000")


def test_cells_come_seed_by_seed() -> None:
    """Hybrids after the pure models, the large pair last; a mixer's cells are a group."""
    options = Options(seeds=(0, 1), folder=Path("x"))
    cells = LANGUAGE.cells(SIZES["full"], options)
    assert [c.key for c in cells[:6:5]] == ["gka, small, seed 0", "gka, small, seed 1"]
    assert [c.key for c in cells[-2:]] == ["gka, large, seed 0", "gated_deltanet, large, seed 0"]
    assert {c.group for c in cells} == set(PURE)


def result(mixer: str, seed: int, lost: float, right: float = 0.5) -> dict[str, Any]:
    """A cell's figures: all losses are 2 + lost."""
    slices = {s: {"tokens": 9, "loss": 2 + lost, "accuracy": 0.5} for s in ("all", "recalled")}
    tasks = [
        {"task": t, "length": 64, "depth": 0.0, "samples": 4, "accuracy": right, "tokens_right": right}
        for t in ("needle-keys", "needle-only")
    ]  # fmt: skip
    positions = [
        {"start": 1, "stop": 64, "loss": 2.0},
        {"start": 64, "stop": 512, "loss": 2.0 + lost},
    ]
    rows = [{"reset": n, "all": 0.0, "repeated": 0.01, "far": None} for n in (16, 128)]
    return {
        "mixer": mixer, "size": "small", "seed": seed, "length": 64, "tasks": tasks,
        "loss": {"memory": slices, "code": slices}, "positions": positions, "utility": {"rows": rows},
    }  # fmt: skip


def test_statements_compare_means_over_seeds() -> None:
    """GKA ahead of the best other linear mixer; without a mixer the statement is open."""
    losses = {
        "gka": (0.0, 0.02),
        "gated_deltanet": (0.02, 0.04),
        "gla": (0.1, 0.1),
        "deltanet": (0.2, 0.2),
    }
    results = [result(m, s, x) for m, pair in losses.items() for s, x in enumerate(pair)]
    found = {c.text: c for c in checks(results)}
    whole = next(c for t, c in found.items() if t.startswith("memory part, all tokens"))
    recalled = next(c for t, c in found.items() if t.startswith("the same on recalled"))
    assert (
        whole.passed
        and recalled.found == "-0.020 to Gated DeltaNet (by seed -0.020 to -0.020)"
        and recalled.passed
    )
    assert next(c for t, c in found.items() if "hybrids" in t).passed is None
    assert rise(results[0]) == 0.0
    assert next(c for c in checks(results[:2]) if "all tokens" in c.text).passed is None


def cell(key: str, group: str, work: Any, seconds: float = 1.0) -> Cell:
    return Cell(key, work, seconds, group=group)


def test_a_group_stays_with_one_process() -> None:
    """Groups are spread by their work, and cells keep their order."""
    cells = [cell(f"{g}{i}", g, dict) for i in range(3) for g in "abc"]
    found = [[c.key for c in share] for share in shares(cells, 2)]
    assert found == [["a0", "c0", "a1", "c1", "a2", "c2"], ["b0", "b1", "b2"]]
    assert [len(share) for share in shares(cells, 9)] == [3, 3, 3]


def test_several_processes_measure_and_one_keeps() -> None:
    """Results and failures arrive; a process that dies leaves a record of its cell."""
    cells = [
        cell("good", "a", partial(dict, x=1)), cell("bad", "b", partial(int, "x")),
        cell("dead", "c", partial(os._exit, 3)), cell("never", "d", dict, seconds=1e6),
    ]  # fmt: skip
    kept: dict[str, dict[str, Any]] = {}
    import time

    measure_all(cells, 4, 1.0, time.monotonic() + 600, lambda c, r: kept.update({c.key: r}))
    assert kept["good"]["result"] == {"x": 1}
    assert kept["bad"]["state"] == "failed" and "ValueError" in kept["bad"]["reason"]
    assert kept["dead"]["reason"] == "its process ended with status 3"
    assert "never" not in kept
