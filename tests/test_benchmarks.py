"""The benchmark of the CPU measures, fits and writes what it says, at sizes that take a second."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gka.errors import InputError
from gka.experiments.ledger import own
from gka.storage import only_writer
from pictures import assert_drawn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.op.cpu")
    monkeypatch.setattr(module, "LENGTHS", (64, 128))
    monkeypatch.setattr(module, "BOTH", (64,))
    monkeypatch.setattr(module, "LONG", 32)
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
    assert result["exponents"].keys() == {"64", "32"}
    assert_drawn(tmp_path / "cpu.png")
    assert "grows as T^" in capsys.readouterr().out


def rows_of(times):
    return [{"length": n, "seconds": {"chunk-wise": [t]}} for n, t in times.items()]


def test_an_interrupted_run_leaves_what_is_finished(cpu, monkeypatch, tmp_path):
    """cpu.json has the rows of all lengths that were finished when the command was stopped."""
    shortest, stopped = cpu.LENGTHS[:2]

    def memory(length: int, form: str) -> float:
        if length == stopped:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(cpu, "peak_memory", memory)
    monkeypatch.setattr(cpu, "BOTH", ())
    with pytest.raises(KeyboardInterrupt):
        cpu.main(["--output", str(tmp_path), "--repeats", "1"])
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert row["length"] == shortest


def test_growth_is_the_exponent(cpu):
    """Times proportional to T^1.5 give 1.5."""
    assert cpu.growth(rows_of({n: n**1.5 for n in (64, 128, 512)})) == pytest.approx(1.5)


def test_a_fixed_cost_is_told_from_growth(cpu, monkeypatch):
    """A cost of each call hides linear growth at short lengths; the fit over the long ones shows it."""
    monkeypatch.setattr(cpu, "LONG", 1000)
    fitted = cpu.exponents(rows_of({n: 1000 + n for n in (64, 256, 100_000, 200_000)}))
    assert fitted["64"] < 0.8 and fitted["1000"] == pytest.approx(1, abs=0.01)


def test_peak_memory_is_printed_as_json(cpu, capsys):
    """The child process prints the MiB that a pass added, or null where that cannot be measured."""
    cpu.print_peak("chunk-wise", 64)
    added = json.loads(capsys.readouterr().out)
    assert added is None or added >= 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets a peak")
def test_peak_memory_is_the_work_s_own():
    """What a process held before is not counted, however much it was at its height; what the work holds
    is, also if it is freed before the end."""
    code = (
        "import torch\nfrom gka.experiments.stopwatch import peak_added\n"
        "torch.ones(96 * 2**18).sum()\n"  # 96 MiB, freed
        "print(peak_added(lambda: torch.ones(32 * 2**18).sum()))"  # 32 MiB, freed too
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if out.stdout == "None\n":
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 30 <= float(out.stdout) < 40, out.stderr


def test_memory_that_cannot_be_measured_is_said_so(cpu, monkeypatch, tmp_path, capsys):
    """Without a way to reset the peak there is no figure: null in JSON, and words in the table."""
    memory = importlib.import_module("gka.experiments.stopwatch")
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no" / "clear_refs")
    assert memory.peak_added(lambda: torch.ones(10)) is None
    monkeypatch.setattr(cpu, "peak_memory", lambda length, form: None)
    monkeypatch.setattr(sys, "argv", ["cpu", "--output", str(tmp_path), "--repeats", "1"])
    cpu.main()
    assert json.loads((tmp_path / "cpu.json").read_text())["rows"][0]["mebibytes"] == {
        "chunk-wise": None,
        "token by token": None,
    }
    assert "memory: not measured" in capsys.readouterr().out


def test_repeats_must_be_positive(cpu, monkeypatch, capsys):
    """--repeats 0 is refused by name, before anything runs."""
    monkeypatch.setattr(sys, "argv", ["cpu", "--repeats", "0"])
    with pytest.raises(SystemExit) as stop:
        cpu.main()
    assert stop.value.code == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err


def test_one_writer_for_the_results_of_a_benchmark(tmp_path: Path) -> None:
    """A benchmark ends at once where another process writes its folder; it may take its own again."""
    with (
        only_writer(tmp_path / "taken"),
        pytest.raises(SystemExit, match=r"error: --output .* being"),
    ):
        own(tmp_path / "taken")
    own(tmp_path / "mine")
    own(tmp_path / "mine")
    with (
        pytest.raises(InputError, match="is being written by process"),
        only_writer(tmp_path / "mine"),
    ):
        pass


def test_every_benchmark_is_run_by_name(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The runner lists all of them, each says what its options are, and an unknown name is refused."""
    pytest.importorskip("triton", reason="host, resources and tune compile kernels")
    monkeypatch.syspath_prepend(str(ROOT))
    run = importlib.import_module("benchmarks.run")
    run.main(["--help"])
    listed = capsys.readouterr().out
    for name in run.BENCHMARKS:
        with pytest.raises(SystemExit) as stop:
            run.main([name, "--help"])
        assert stop.value.code == 0 and f"  {name} " in listed
        assert f"usage: python -m benchmarks.run {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no benchmark 'gpu'; there are"):
        run.main(["gpu"])
