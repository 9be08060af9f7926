"""`gka train` on several ranks: killed, stopped, resumed on other numbers of ranks, it ends as one run."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from parallel.jobs import end_ranks, run_ranks

TABLES: dict[str, Any] = {
    "data": {"sequence_length": 16, "eval_fraction": 0.2},
    "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "num_iter": 3},
    "training": {
        "max_steps": 12, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2, "log_steps": 1,
        "eval_steps": 6, "save_steps": 3, "keep_checkpoints": 9,
    },
}  # fmt: skip


class Runs:
    """Runs of one corpus in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, text = folder, folder / "text"
        text.mkdir(parents=True)
        for i in range(40):
            (text / f"{i:02}.txt").write_text(f"one two {i:03} three {i * 7919 % 1000:03}\n")
        self.tables = TABLES | {"data": TABLES["data"] | {"text": [str(text)]}}

    def arguments(self, name: str, event: Any = None, resume: bool = False) -> list[str]:
        how = "resume" if resume else "new"
        paths = str(self.folder / f"{name}.json"), str(self.folder / name)
        return [paths[0], json.dumps(self.tables), paths[1], json.dumps(event), how]

    def complete(self, name: str, ranks: int, resume: bool = False) -> dict[str, Any]:
        return run_ranks("a_run.py", ranks, *self.arguments(name, resume=resume))

    def disturbed(
        self, name: str, ranks: int, step: int, number: int, resume: bool = False
    ) -> tuple[list[int], str]:
        """Statuses of all ranks and what they said, after a signal to the last of them."""
        event = {"step": step, "rank": ranks - 1, "signal": number}
        codes, said = end_ranks("a_run.py", ranks, *self.arguments(name, event, resume))
        return codes, "\n".join(said)

    def weights(self, name: str) -> dict[str, Any]:
        return load_file(self.folder / name / "model" / "model.safetensors")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("GKA_CACHE", str(tmp_path / "cache"))
    return Runs(tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_on_four_two_and_one(runs: Runs) -> None:
    """A rank killed at step 4 of four, at step 7 of two; finished on one: float64 losses within 1e-10.
    Resumed on four after the same kill, it ends bit for bit where the undisturbed run does."""
    whole = runs.complete("whole", 4)
    for name in ("same", "other"):
        codes, said = runs.disturbed(name, 4, 4, signal.SIGKILL)
        assert codes[-1] == -signal.SIGKILL and all(codes)
        assert "rank 3 of 4 was lost" in said
        assert f"gka train --resume --output {runs.folder / name}" in said
    same = runs.complete("same", 4, resume=True)
    assert _curves(same) == _curves(whole)
    ours, theirs = runs.weights("same"), runs.weights("whole")
    assert all(ours[n].equal(theirs[n]) for n in theirs)
    codes, said = runs.disturbed("other", 2, 7, signal.SIGKILL, resume=True)
    assert all(codes) and "rank 1 of 2 was lost" in said
    other = runs.complete("other", 1, resume=True)
    assert _curves(other) == [pytest.approx(row, rel=1e-10) for row in _curves(whole)]
    ours = runs.weights("other")
    assert all((ours[n] - theirs[n]).abs().max() < 1e-10 for n in theirs)
    codes, said = end_ranks("a_run.py", 3, *runs.arguments("other", resume=True))
    assert not any(codes)  # it is complete


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(runs: Runs) -> None:
    """SIGTERM to the last of two ranks in step 5: both stop after it. Three refuse to go on, one does."""
    codes, said = runs.disturbed("run", 2, 4, signal.SIGTERM)
    assert codes == [3, 3]
    assert said.count("stopped after 5 by 15") == 2
    assert (runs.folder / "run" / "checkpoints" / "checkpoint-5" / "complete.json").is_file()
    codes, said = end_ranks("a_run.py", 3, *runs.arguments("run", resume=True))
    assert codes == [2, 2, 2]
    assert "4 blocks a step, which 3 ranks" in said[0]
    one = runs.complete("run", 1, resume=True)
    assert one["training"]["blocks_per_step"] == 4


@pytest.mark.slow
def test_rows_over_ranks_killed_and_resumed_on_others(runs: Runs) -> None:
    """Rows over two ranks with two shards, killed at step 4; over four ranks, killed at step 7; finished on
    one: the float64 losses of one process within 1e-10, held-out ones included."""
    runs.tables = runs.tables | {"data": runs.tables["data"] | {"sequence_length": 200}}
    tables = runs.tables
    whole = runs.complete("whole", 1)

    def over(cp: int, batch: int) -> None:
        training = {**tables["training"], "batch_size": batch}
        runs.tables = tables | {"parallel": {"cp": cp}, "training": training}

    over(2, 1)
    codes, said = runs.disturbed("split", 4, 4, signal.SIGKILL)
    assert all(codes) and "rank 3 of 4 was lost" in said
    over(4, 2)
    codes, said = runs.disturbed("split", 4, 7, signal.SIGKILL, resume=True)
    assert all(codes) and "rank 3 of 4 was lost" in said
    runs.tables = tables
    split = runs.complete("split", 1, resume=True)
    assert _curves(split) == [pytest.approx(row, rel=1e-10) for row in _curves(whole)]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(runs: Runs) -> None:
    """A disk that is full on the last of two ranks, then its death, while checkpoint-6 is written beside
    training: both ranks tell the first, checkpoint-3 is there to go on from, and the run ends bit for bit as
    one whose checkpoints were written at once."""
    at_once = Runs(runs.folder / "at once")
    at_once.tables |= {"training": TABLES["training"] | {"save_async": "off"}}
    at_once.tables["data"] = runs.tables["data"]
    whole, checkpoints = at_once.complete("whole", 2), runs.folder / "run" / "checkpoints"
    event = {"writing": 6, "rank": 1}
    codes, said = end_ranks("a_run.py", 2, *runs.arguments("run", event))
    told = f"checkpoint {checkpoints}/checkpoint-6 cannot be written: No space left on device (rank 1); "
    assert codes == [2, 2] and all(told in text for text in said)
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
    killed = event | {"signal": signal.SIGKILL}
    codes, said = end_ranks("a_run.py", 2, *runs.arguments("run", killed, resume=True))
    assert all(codes) and any("rank 1 of 2 was lost" in text for text in said)
    assert (checkpoints / "checkpoint-6" / ".unfinished").exists()
    assert _curves(runs.complete("run", 2, resume=True)) == _curves(whole)
    ours, theirs = runs.weights("run"), at_once.weights("whole")
    assert all(ours[n].equal(theirs[n]) for n in theirs)


def _curves(metrics: dict[str, Any]) -> list[list[float]]:
    curves = metrics["curves"]
    training = [[row["step"], row["loss"], row["grad_norm"]] for row in curves["training"]]
    return training + [[row["step"], row["loss"]] for row in curves["evaluation"]]
