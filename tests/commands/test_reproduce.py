"""`gka reproduce`: every experiment in its smallest size, and what the command refuses."""

import json
from pathlib import Path

import pytest

from calling import Run
from gka.experiments.reproduce.registry import EXPERIMENTS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name: str, gka: Run) -> None:
    """Cells, page and picture; sizes that only show that it runs decide nothing."""
    folder = Path("runs/reproduce/smoke")
    status, out, err = gka("reproduce", name, "--smoke", "--device", "cpu")
    assert status == 0, err
    assert "cells to measure, 0 kept: about" in out and "verdict: open" in out
    found = json.loads((folder / f"{name}.json").read_text())
    assert all(cell["state"] == "done" for cell in found["cells"].values())
    assert found["runs"][0]["command"] == f"gka reproduce {name} --smoke --device cpu"
    page = (folder / f"{name}.md").read_text()
    assert EXPERIMENTS[name].claim in page and f"]({name}.png)" in page
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    _, out, _ = gka("reproduce", "--list")
    assert f"{EXPERIMENTS[name].title}. Last verdict: open (smoke)" in out


def test_a_second_call_measures_nothing_again(gka: Run) -> None:
    """Lists among the settings are read back as they were written."""
    for kept in (0, 3):
        _, out, err = gka("reproduce", "key-statistics", "--smoke", "--device", "cpu")
        assert f"{3 - kept} cells to measure, {kept} kept" in out, err


def test_without_a_name_it_lists_claims(gka: Run) -> None:
    """Every experiment with its claim; none has run."""
    status, out, _ = gka("reproduce")
    assert status == 0 and out.count("Last verdict: not run") == len(EXPERIMENTS)
    assert all(e.claim in out and e.source in out for e in EXPERIMENTS.values())


def test_bad_input_is_refused(gka: Run) -> None:
    """Unknown names, sizes at once, and models where none is read; nothing is written."""
    for arguments, message in (
        (["mqar2"], "there is no experiment 'mqar2'"),
        (["gradients", "--quick", "--smoke"], "--quick and --smoke exclude each other"),
        (["gradients", "--smoke", "--minutes", "0"], "--minutes is 0; expected above 0"),
        (["gradients", "--smoke", "--seeds", "0"], "--seeds is 0"),
        (["gradients", "--smoke", "--model", "x"], "gradients reads no model"),
        (["convergence", "--smoke", "--model", "x"], "x holds no model"),
    ):
        status, _, err = gka("reproduce", *arguments)
        assert status == 2 and message in err


def test_failed_cells_and_cells_without_time_are_said(
    gka: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1 if a cell failed; with --minutes what is left, and the next call goes on."""
    args = ("reproduce", "key-statistics", "--smoke", "--device", "cpu")
    status, out, _ = gka(*args, "--minutes", "0.0001")
    assert status == 0 and "3 cells did not fit into 0.0001 minutes" in out
    from gka.experiments.reproduce import key_statistics

    monkeypatch.setattr(key_statistics.reg, "kalman_filter", lambda stream: 1 / 0)
    status, out, _ = gka(*args)
    assert status == 1 and "failed: ZeroDivisionError" in out and "3 cells failed" in out
