"""Claim: the package works outside its checkout: recipes, version, `python -m gka`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gka

ROOT = Path(__file__).parents[1]


def test_version() -> None:
    """`python -m gka --version` says which version this is."""
    ran = subprocess.run(
        [sys.executable, "-m", "gka", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == f"gated-kalmanet {gka.__version__}"


def test_wheel_is_whole(tmp_path: Path) -> None:
    """A wheel has recipes and kernel sources in it, and its recipes are found where no checkout is."""
    pytest.importorskip("setuptools")
    build = (
        "import sys; from setuptools import build_meta; "
        f"print(build_meta.build_wheel({str(tmp_path)!r}))"
    )
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        (source / name).symlink_to(ROOT / name)
    ran = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("gka/recipes/cpu.toml", "gka/kernels/hopper/decay.cuh", "gka/py.typed"):
        assert name in names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    ask = "from gka.training import read_recipe; print(sorted(read_recipe('cpu')))"
    path = {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "model" in ran.stdout
