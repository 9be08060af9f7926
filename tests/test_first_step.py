"""The benchmark of first steps on a CPU: processes that share a cache, and what it tells of each."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def first_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.model import first_step

    return first_step


def test_each_process_is_told(
    first_step: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seconds of every step, graphs and kernels compiled and read, in JSON and as a line; uncompiled here."""
    paths = f"{ROOT / 'src'}:{ROOT}"
    monkeypatch.setenv("PYTHONPATH", paths)
    words = [
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--mixer",
        "gla",
        "--how",
        "off",
        "--processes",
        "1",
    ]
    first_step.main([*words, "--output", str(tmp_path)])
    (found,) = json.loads((tmp_path / "first-step.json").read_text())["processes"]
    assert len(found["step_s"]) == first_step.STEPS and all(s > 0 for s in found["step_s"])
    assert found["graphs"] == {"compiled": 0, "read": 0} and found["cubins"] == {}
    assert "graphs: 0 compiled, 0 read; CUDA C++ kernels: none" in capsys.readouterr().out
    assert not (tmp_path / "process.json").exists()
