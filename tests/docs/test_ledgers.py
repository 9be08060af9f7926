"""The ledgers of unfinished runs that stand beside the results' pages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gka.experiments.reproduce.experiment import Options
from gka.experiments.reproduce.registry import EXPERIMENTS
from gka.experiments.reproduce.runner import Reproduction

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "ledgers"
KNOWN = [file for file in sorted(FOLDER.glob("*.json")) if file.stem in EXPERIMENTS]


@pytest.mark.parametrize("file", KNOWN, ids=lambda file: file.stem)
def test_a_later_run_goes_on_with_the_ledger(file: Path, tmp_path: Path) -> None:
    """Same version and sizes: finished cells are kept, the page is the one in the repository."""
    shutil.copy(file, tmp_path)
    settings = json.loads(file.read_text())["settings"]
    experiment, size = EXPERIMENTS[file.stem], settings["size"]
    if experiment.corpus is not None:  # it is made of what is installed: here from other packages
        experiment = replace(experiment, corpus=lambda *_: settings["corpus"])
    seeds = tuple(range(experiment.seeds[size]))
    options = Options(settings["device"], seeds, folder=tmp_path)
    run = Reproduction(experiment, size, options, tmp_path, "")
    done = [r for r in run.known.values() if r["state"] == "done"]
    plan = run.plan()
    assert 0 < plan.done == len(done) and plan.done + len(plan.cells) == len(run.cells)
    run.report()
    page = (tmp_path / f"{file.stem}.md").read_text()
    assert page == (FOLDER.parent / f"{file.stem}.md").read_text()
