"""A priming run that is killed and resumed ends bit for bit where an undisturbed one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gka.errors import InputError
from gka.training import Interrupted, callbacks

Prime = Callable[..., dict[str, Any]]
Primed = tuple[Path, dict[str, Any]]
NO_TRAINING: dict[str, Any] = {"stage1": {"max_steps": 0}, "stage2": {"max_steps": 0}}

# A process that dies by SIGKILL in the midst of writing checkpoint-4 of a stage, after its weights.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from rich.console import Console
from transformers import Trainer
from gka.training.priming import PrimeConfig, prime

save = Trainer._save_rng_state
def killed(self, folder):
    if self.state.global_step == 4 and sys.argv[3] in folder:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = killed
prime(PrimeConfig.from_tables(json.loads(sys.argv[1])), Path(sys.argv[2]), console=Console(), picture=False)
"""


def _same(metrics: dict[str, Any], output: Path, primed: Primed) -> None:
    """Figures of all phases, losses of both stages and all weights are equal to the last bit."""
    for name in ("phases", "match", "layers"):
        assert metrics[name] == primed[1][name]
    for stage in ("stage1", "stage2"):
        losses = [
            [
                (r["step"], r["loss"], r.get("grad_norm"))
                for rows in m["curves"].values()
                for r in rows
            ]
            for m in (metrics["stages"][stage], primed[1]["stages"][stage])
        ]
        assert losses[0] == losses[1]
    for name in ("stage1/model", "model"):
        weights = [load_file(p / name / "model.safetensors") for p in (output, primed[0])]
        assert weights[0].keys() == weights[1].keys()
        assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_while_writing_a_checkpoint(
    run_prime: Prime, prime_tables: dict[str, Any], primed: Primed, tmp_path: Path, stage: str
) -> None:
    """After SIGKILL inside checkpoint-4 of either stage, the run resumes to the same result."""
    output = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, json.dumps(prime_tables), str(output), stage]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    half = output / stage / "checkpoints" / "checkpoint-4"
    assert half.is_dir() and not (half / "complete.json").exists()
    assert (output / "stage1" / "metrics.json").exists() == (stage == "stage2")
    _same(run_prime(output, resume=True), output, primed)


@pytest.mark.parametrize(
    "lost",
    [
        ["metrics.json", "model"],
        ["metrics.json", "model", "stage2/checkpoints"],
        ["metrics.json", "model", "stage2", "stage1/metrics.json"],
        ["metrics.json", "model", "stage2", "stage1/metrics.json", "stage1/model", "report"],
    ],
)
def test_killed_between_the_phases(
    run_prime: Prime, primed: Primed, tmp_path: Path, lost: list[str]
) -> None:
    """Whichever phase's results had not been written yet: they are made again, the same."""
    output = tmp_path / "run"
    shutil.copytree(primed[0], output)
    for name in lost:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _same(run_prime(output, resume=True), output, primed)


def test_interruption_saves_and_resumes_exactly(
    run_prime: Prime, primed: Primed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in stage 1 ends the run with a checkpoint; resuming gives the same models."""
    step_end = callbacks.Stopwatch.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 2:  # noticed at the end of the next step
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Stopwatch, "on_step_end", interrupted)
        with pytest.raises(Interrupted) as stop:
            run_prime(output)
    assert stop.value.step == 3
    assert not (output / "stage1" / "model").exists()
    _same(run_prime(output, resume=True), output, primed)


def test_complete_run_is_left_alone(run_prime: Prime, primed: Primed) -> None:
    """Resuming a complete run changes nothing and returns its metrics."""
    before = {p: p.stat().st_mtime_ns for p in primed[0].rglob("*")}
    assert run_prime(primed[0], resume=True) == primed[1]
    assert {p: p.stat().st_mtime_ns for p in primed[0].rglob("*")} == before


def test_changed_teacher_is_refused(
    run_prime: Prime, primed: Primed, teacher: Path, tmp_path: Path
) -> None:
    """A run whose teacher's weights have changed since it began is not resumed."""
    shutil.copytree(teacher, tmp_path / "teacher")
    changes = {
        "prime": {"teacher": str(tmp_path / "teacher")},
        "stage1": {"max_steps": 0},
        "stage2": {"max_steps": 0},
    }
    run_prime(tmp_path / "run", changes)
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.copy(primed[0] / "model" / "config.json", tmp_path / "spare.json")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    with pytest.raises(InputError, match="teacher has changed since the run"):
        run_prime(tmp_path / "run", changes, resume=True)


def test_runs_of_other_commands_are_not_resumed(primed: Primed) -> None:
    """A folder of `gka prime` is no run of `gka train`, and is told so."""
    from gka.training import RunConfig
    from gka.training.folder import resumed_config

    with pytest.raises(InputError, match="is of another command: its tables are prime, mixer"):
        resumed_config(primed[0], {}, RunConfig)


def test_overwrite_replaces_the_run_and_nothing_else(
    run_prime: Prime, primed: Primed, tmp_path: Path
) -> None:
    """--overwrite deletes stages, report and model of the former run; a file of the user's stays."""
    output = tmp_path / "run"
    shutil.copytree(primed[0], output)
    (output / "notes.txt").write_text("mine")
    run_prime(output, NO_TRAINING, overwrite=True)
    assert sorted(p.name for p in output.iterdir()) == [
        "metrics.json", "model", "notes.txt", "report", "run.json",
    ]  # fmt: skip
