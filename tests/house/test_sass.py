"""Folders of machine code are compared only if they are finished."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need the package triton")
ROOT = Path(__file__).parents[2]


def test_an_unfinished_folder_is_named(tmp_path: Path) -> None:
    """A folder without its list of kernels is refused in one line that says what to do."""
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "kernels.txt").write_text("0123 cuda forward | op | REG:168\n")
    (tmp_path / "after" / "code").mkdir(parents=True)
    command = [sys.executable, "-m", "tests.house.sass", "--compare"]
    told = subprocess.run(
        [*command, *(str(tmp_path / name) for name in ("before", "after"))],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert "after: expected a finished folder" in told.stderr and "--output" in told.stderr
