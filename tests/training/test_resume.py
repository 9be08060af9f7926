"""A run that is killed and resumed ends bit for bit where an undisturbed one does."""

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
from gka.training.checkpoints import fault

Run = Callable[..., dict[str, Any]]
Reference = tuple[Path, dict[str, Any]]

# A process that dies by SIGKILL in the midst of writing checkpoint-8, after the weights were written.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from rich.console import Console
from transformers import Trainer
from gka.training import RunConfig, train

save = Trainer._save_rng_state
def killed(self, folder):
    if self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_rng_state = killed
train(RunConfig.from_tables(json.loads(sys.argv[1])), Path(sys.argv[2]), console=Console())
"""


def _same(metrics: dict[str, Any], output: Path, reference: Reference) -> None:
    """Losses of both curves and all weights are equal to the last bit."""
    for name in ("training", "evaluation"):
        losses = [
            [(row["step"], row["loss"], row.get("grad_norm")) for row in m["curves"][name]]
            for m in (metrics, reference[1])
        ]
        assert losses[0] == losses[1]
    weights = [load_file(p / "model" / "model.safetensors") for p in (output, reference[0])]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def _unfinished(reference: Reference, tmp_path: Path) -> Path:
    """A copy of the undisturbed run as it was before its end: checkpoints 8 and 12, no results."""
    output = tmp_path / "run"
    shutil.copytree(reference[0], output)
    shutil.rmtree(output / "model")
    (output / "metrics.json").unlink()
    return output


def test_killed_while_writing_a_checkpoint(
    run_tiny: Run, tables: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    """After SIGKILL inside checkpoint-8, the run resumes from checkpoint-4 to the same result."""
    output = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, json.dumps(tables), str(output)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    half = output / "checkpoints" / "checkpoint-8"
    assert (half / "model.safetensors").exists()
    assert not (half / "complete.json").exists()
    metrics = run_tiny(output, resume=True)
    assert "checkpoint-8 is not loaded: it was cut short" in metrics["shown"]
    assert "resuming from" in metrics["shown"]
    assert "checkpoint-4" in metrics["shown"]
    _same(metrics, output, reference)
    left = {path.name for path in half.parent.iterdir()}
    assert left == {"checkpoint-8", "checkpoint-12"}  # the cut one went when it was there again


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_truncated_checkpoint_is_set_aside(
    run_tiny: Run, reference: Reference, tmp_path: Path, name: str
) -> None:
    """A checkpoint with any file cut short is not loaded; the one before it gives the same result."""
    output = _unfinished(reference, tmp_path)
    path = output / "checkpoints" / "checkpoint-12" / name
    path.write_bytes(path.read_bytes()[:-7])
    metrics = run_tiny(output, resume=True)
    assert f"not loaded: {name} has" in metrics["shown"]
    assert (output / "checkpoints" / "damaged-checkpoint-12").is_dir()
    _same(metrics, output, reference)


def test_killed_between_training_and_saving(
    run_tiny: Run, reference: Reference, tmp_path: Path
) -> None:
    """Killed after the last step but before the model was saved: resuming saves the same model."""
    output = _unfinished(reference, tmp_path)
    _same(run_tiny(output, resume=True), output, reference)


def test_killed_after_the_last_step_within_an_epoch(run_tiny: Run, tmp_path: Path) -> None:
    """A resumed run whose last checkpoint is its last step takes no step more, epochs or not."""
    changes = {"training": {"max_steps": 6}}  # an epoch and a half
    whole = run_tiny(tmp_path / "run", changes)
    model = tmp_path / "run" / "model"
    weights = load_file(model / "model.safetensors")
    shutil.rmtree(model)
    (tmp_path / "run" / "metrics.json").unlink()
    again = run_tiny(tmp_path / "run", changes, resume=True)
    assert again["training"]["steps"] == 6
    assert again["curves"] == whole["curves"]
    saved = load_file(model / "model.safetensors")
    assert all(saved[key].equal(weights[key]) for key in weights)


def test_without_a_whole_checkpoint_it_starts_over(
    run_tiny: Run, reference: Reference, tmp_path: Path
) -> None:
    """If no checkpoint is whole, the run says so and starts from step 0, to the same result."""
    output = _unfinished(reference, tmp_path)
    for seal in output.rglob("complete.json"):
        seal.unlink()
    metrics = run_tiny(output, resume=True)
    assert "no whole checkpoint: starting from step 0" in metrics["shown"]
    _same(metrics, output, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_saves_and_resumes_exactly(
    run_tiny: Run,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """A signal in step 6 ends the run after it with a checkpoint; resuming gives the same model."""
    step_end = callbacks.Stopwatch.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:  # noticed at the end of the next step
            os.kill(os.getpid(), number)

    output, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Stopwatch, "on_step_end", interrupted)
        with pytest.raises(Interrupted) as stop:
            run_tiny(output)
    assert (stop.value.step, stop.value.signal) == (6, number)
    assert signal.getsignal(number) is handler
    assert (output / "checkpoints" / "checkpoint-6" / "complete.json").exists()
    assert not (output / "model").exists()
    _same(run_tiny(output, resume=True), output, reference)


# A training on a terminal of its own, which is closed in the midst of step 6.
HUNG_UP = """
import json, os, pty, sys
from pathlib import Path
pid, terminal = pty.fork()
if pid:
    while b"step      6" not in (shown := os.read(terminal, 4096)) and shown:
        pass
    os.close(terminal)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
from gka.training import RunConfig, train, Interrupted
from gka.console import text_console
tables = json.loads(sys.argv[1])
tables["training"]["max_steps"] = 100000
try:
    console = text_console()
    train(RunConfig.from_tables(tables), Path(sys.argv[2]), console=console)
except Interrupted as stop:
    console.print("Stopped")
    os._exit(100 + stop.signal)
"""


def test_a_closed_terminal_saves(tables: dict[str, Any], tmp_path: Path) -> None:
    """When its terminal is closed a training saves a checkpoint and ends; writing to it is no error then."""
    output = tmp_path / "run"
    command = [sys.executable, "-c", HUNG_UP, json.dumps(tables), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 100 + signal.SIGHUP, done.stderr
    saved = sorted(output.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert fault(saved[-1]) is None


def test_nohup_is_respected() -> None:
    """Where SIGHUP is ignored, as under nohup, a training goes on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with callbacks.stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_complete_run_is_not_trained_again(run_tiny: Run, reference: Reference) -> None:
    """Resuming a complete run changes nothing and reports its results."""
    before = {p: p.stat().st_mtime_ns for p in reference[0].rglob("*")}
    metrics = run_tiny(reference[0], resume=True)
    assert "is complete" in metrics["shown"]
    assert metrics["evaluation"] == reference[1]["evaluation"]
    assert {p: p.stat().st_mtime_ns for p in reference[0].rglob("*")} == before


def test_changed_text_is_refused(run_tiny: Run, tmp_path: Path) -> None:
    """A run whose text has changed since it began is not resumed: the result would be neither's."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name * 200)
    changes = {"data": {"text": [str(folder)], "eval_fraction": 0.4}, "training": {"max_steps": 1}}
    run_tiny(tmp_path / "run", changes)
    (tmp_path / "run" / "metrics.json").unlink()
    (folder / "a").write_text("c" * 200)
    with pytest.raises(InputError, match="text has changed since the run"):
        run_tiny(tmp_path / "run", changes, resume=True)


def test_nothing_to_resume_is_an_error(run_tiny: Run, tmp_path: Path) -> None:
    """--resume needs a run; with --overwrite it contradicts itself."""
    with pytest.raises(InputError, match="holds no run to resume"):
        run_tiny(tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="exclude each other"):
        run_tiny(tmp_path / "none", resume=True, overwrite=True)
