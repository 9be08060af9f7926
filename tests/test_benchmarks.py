"""The benchmark of the CPU measures, fits and writes what it says, at sizes that take a second."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.cpu")
    monkeypatch.setattr(module, "LENGTHS", (64, 128))
    monkeypatch.setattr(module, "BOTH", (64,))
    monkeypatch.setattr(module, "peak_memory", lambda length, form: float(length))
    return module


def test_results_are_written_in_full(cpu, monkeypatch, tmp_path, capsys):
    """Every repeat of every form, their ratios, memory and the fitted exponent in JSON; a table; a plot."""
    monkeypatch.setattr(sys, "argv", ["cpu", "--output", str(tmp_path), "--repeats", "2"])
    cpu.main()
    result = json.loads((tmp_path / "cpu.json").read_text())
    both, alone = result["rows"]
    assert set(both["seconds"]) == {"chunk-wise", "token by token"}
    assert set(alone["seconds"]) == {"chunk-wise"} and "ratios" not in alone
    fast, slow = both["seconds"].values()
    assert both["ratios"] == [b / a for a, b in zip(fast, slow, strict=True)] and len(fast) == 2
    assert alone["mebibytes"] == {"chunk-wise": 128.0}
    assert isinstance(result["exponent"], float)
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    assert "grows as T^" in capsys.readouterr().out


def test_growth_is_the_exponent(cpu):
    """Times proportional to T^1.5 give 1.5."""
    rows = [{"length": n, "seconds": {"chunk-wise": [n**1.5]}} for n in (64, 128, 512)]
    assert cpu.growth(rows) == pytest.approx(1.5)


def test_peak_memory_is_printed_as_a_number(cpu, capsys):
    """The child process prints the MiB that a pass added: a number, not negative."""
    cpu.print_peak("chunk-wise", 64)
    assert float(capsys.readouterr().out) >= 0


def test_repeats_must_be_positive(cpu, monkeypatch, capsys):
    """--repeats 0 is refused by name, before anything runs."""
    monkeypatch.setattr(sys, "argv", ["cpu", "--repeats", "0"])
    with pytest.raises(SystemExit) as stop:
        cpu.main()
    assert stop.value.code == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err
