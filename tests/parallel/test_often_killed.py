"""A run killed ten times at random moments and resumed each time ends as the run that nothing disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from parallel.jobs import TESTS
from parallel.test_runs import TABLES, _curves

STEPS, KILLS, LATEST = 45, 10, 0.15
RATE = 2e-3
"""At 1e-2 rounding grows to 1e-3 in 45 steps, between undisturbed runs on 1 and 4 ranks as well."""
LOSSES = {"float64": 1e-10, "float32": 2e-5}
"""Largest relative differences of losses and norms to the run on one rank: sums in another order."""


class Sequences:
    """Undisturbed and disturbed runs of one corpus, in one dtype."""

    def __init__(self, folder: Path) -> None:
        self.folder, text = folder, folder / "text"
        text.mkdir()
        for i in range(40):
            (text / f"{i:02}.txt").write_text(f"one two {i:03} three {i * 7919 % 1000:03}\n")
        training = TABLES["training"] | {
            "max_steps": STEPS, "batch_size": 4, "learning_rate": RATE, "keep_checkpoints": 2,
        }  # fmt: skip
        self.tables = TABLES | {
            "data": TABLES["data"] | {"text": [str(text)]}, "training": training,
        }  # fmt: skip

    def run(self, name: str, starts: list[dict[str, Any]], dtype: str) -> tuple[Any, list[Any]]:
        """The curves and weights at the end, and what each start ended with."""
        asked, found = self.folder / f"{name}.asked.json", self.folder / f"{name}.json"
        output = self.folder / name
        asked.write_text(json.dumps({
            "tables": self.tables, "output": str(output), "dtype": dtype, "starts": starts,
        }))  # fmt: skip
        path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), str(TESTS / "parallel")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        program = str(TESTS / "parallel" / "often_killed.py")
        subprocess.run([sys.executable, program, str(asked), str(found)], env=env, check=True)
        told = json.loads(found.read_text())
        assert not any(told[-1]["codes"]), told[-1]["said"]
        metrics = json.loads(found.with_suffix(".metrics.json").read_text())
        return (_curves(metrics), load_file(output / "model" / "model.safetensors")), told


def killed(ranks: tuple[int, ...], seed: int) -> list[dict[str, Any]]:
    """Starts on these ranks in turn: one of them is killed at a random moment of a random step, ten times."""
    draw = random.Random(seed)
    steps = [*sorted(draw.sample(range(1, STEPS - 4), KILLS)), None]
    starts = []
    for step, count in zip(steps, islice(cycle(ranks), KILLS + 1), strict=True):
        event = None
        if step is not None:
            event = {
                "step": step, "rank": draw.randrange(count), "signal": signal.SIGKILL,
                "delay": draw.uniform(0.0, LATEST),
            }  # fmt: skip
        starts.append({"ranks": count, "event": event})
    return starts


def died(starts: list[dict[str, Any]], told: list[Any]) -> None:
    """Each start but the last lost the rank that was killed, and no rank of it ended well."""
    for one, end in zip(starts[:-1], told[:-1], strict=True):
        assert end["codes"][one["event"]["rank"]] == -signal.SIGKILL, end["said"]
        assert all(end["codes"])
        assert end["sealed"] >= end["from"]  # no checkpoint was lost


@pytest.fixture
def sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequences:
    monkeypatch.setenv("GKA_CACHE", str(tmp_path / "cache"))
    return Sequences(tmp_path)


@pytest.mark.slow
def test_on_the_same_number_of_ranks(sequences: Sequences) -> None:
    """On two ranks in float32, killed ten times: curves and weights are equal to the last bit."""
    whole, _ = sequences.run("whole", [{"ranks": 2, "event": None}], "float32")
    starts = killed((2,), seed=1)
    same, told = sequences.run("same", starts, "float32")
    died(starts, told)
    assert same[0] == whole[0]
    assert all(same[1][name].equal(whole[1][name]) for name in whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOSSES)
def test_on_one_two_and_four_ranks_in_turn(sequences: Sequences, dtype: str) -> None:
    """Resumed on 1, 2 and 4 ranks in turn after ten kills: losses within LOSSES of the run on one rank."""
    whole, _ = sequences.run("whole", [{"ranks": 1, "event": None}], dtype)
    starts = killed((1, 2, 4), seed=2)
    other, told = sequences.run("other", starts, dtype)
    died(starts, told)
    pairs = [
        (a, b)
        for ours, theirs in zip(other[0], whole[0], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    apart = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
    print(f"{dtype}: largest relative difference of losses and norms {apart:.1e}")
    assert apart < LOSSES[dtype]
