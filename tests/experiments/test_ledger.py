"""What experiments keep: figures that are taken up again, tables and pictures."""

import json
from pathlib import Path

import pytest
import torch

from gka.errors import InputError
from gka.experiments import conjugate, numerics
from gka.experiments.ledger import Ledger, markdown_table, print_table


def test_cells_that_are_known_are_not_measured_again(tmp_path: Path) -> None:
    """A run with the same settings goes on where another ended; with others it is refused."""
    measured: list[str] = []

    def cells(settings: dict[str, int], resume: bool) -> list[int]:
        ledger = Ledger(tmp_path, "squares")
        ledger.begin(settings, resume)
        return [ledger.cell(n, lambda n=n: measured.append(n) or int(n) ** 2) for n in "23"]

    assert cells({"seed": 0}, False) == cells({"seed": 0}, True) == [4, 9] and measured == [
        "2",
        "3",
    ]
    assert cells({"seed": 1}, False) == [4, 9] and len(measured) == 4
    with pytest.raises(InputError, match=r"squares\.json has figures of other settings"):
        cells({"seed": 0}, True)


def test_figures_are_written_as_they_come(tmp_path: Path) -> None:
    """The JSON is whole after every figure; page and picture follow."""
    ledger = Ledger(tmp_path, "found")
    ledger.note(first=1)
    ledger.note(second=[2, 3])
    assert json.loads((tmp_path / "found.json").read_text()) == {"first": 1, "second": [2, 3]}
    ledger.report("page\n", lambda figure: figure.subplots().plot([1, 2]))
    assert (tmp_path / "found.md").read_text() == "page\n"
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_tables_without_rich_are_text(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Columns are as wide as their widest cell, and no cell is lost."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    print_table(("name", "ms"), [("a", 10.5), ("longer", "")], "times")
    assert capsys.readouterr().out == "times\nname    ms\na       10.5\nlonger\n"
    assert markdown_table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_tables_of_numerics_are_printed_and_kept(tmp_path: Path, capsys) -> None:
    """What is printed stands in numerics.md too; names that do not exist are refused."""
    numerics.main(["bound", "--output", str(tmp_path)])
    page = (tmp_path / "numerics.md").read_text()
    assert "| 30 | 2.5e-02 | 4.1e-03 | 3.2e-04 |" in page and page in capsys.readouterr().out
    found = json.loads((tmp_path / "numerics.json").read_text())
    assert found["settings"] == {"seed": 0, "torch": torch.__version__}
    with pytest.raises(SystemExit, match="unknown table limits; there are bound, forms"):
        numerics.main(["limits"])


def test_tables_of_conjugate_gradients_are_printed_and_kept(tmp_path: Path, capsys) -> None:
    """At a small size: the error of cg stays within the target, and its gradients are closer to the exact
    ones than those of 30 Chebyshev steps; sizes that make no sense are refused."""
    small = ["--length", "70", "--dim", "16", "--heads", "1", "--output", str(tmp_path)]
    conjugate.main(["steps", "gradients", *small])
    page = (tmp_path / "conjugate.md").read_text()
    assert page.strip() in capsys.readouterr().out
    found = json.loads((tmp_path / "conjugate.json").read_text())["cells"]
    for row in found["steps"]["rows"]:
        assert float(row[5]) < 3.3e-4 and row[4] <= 39
    for row in found["gradients"]["rows"][:6]:  # float64 and float32
        exact, chebyshev, _, cg = (float(cell.split(" ")[0]) for cell in row[2:6])
        assert exact < 1e-4 and cg < chebyshev
    with pytest.raises(SystemExit, match="--heads must be positive; got 0"):
        conjugate.main(["--heads", "0"])
    with pytest.raises(SystemExit, match="unknown table bound; there are steps, gradients, cost"):
        conjugate.main(["bound"])
