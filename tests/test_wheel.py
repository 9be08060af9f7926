"""The distribution: built as for publishing, and used where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import gka

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("src", "docs", "benchmarks", "tests")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")

pytest.importorskip("setuptools", "77", reason="setuptools 77 builds the wheel")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def sdist(place: Path) -> Path:
    """The source distribution, built from a copy so that nothing is written into the checkout."""
    copy = place / "copy"
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_SOURCES)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(place)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return next(place.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(place: Path, sdist: Path) -> Path:
    """The wheel, built from the source distribution alone."""
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", place, sdist)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def apart(place: Path, wheel: Path) -> Path:
    """`bin` of an environment with the wheel in it, and nothing of the checkout.

    Its other packages are those of this environment, found behind its own.
    """
    folder = place / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    _pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    others = Path(torch.__file__).parents[1]
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "others.pth").write_text(f"{others}\n")  # .pth files of theirs are not read
    where = _run(folder / "bin", place, "python", "-c", "import gka; print(gka.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(own)
    return folder / "bin"


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def _run(
    programs: Path, cwd: Path, program: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"GKA_CACHE": str(cwd / "cache"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [programs / program, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_is_the_package_with_all_its_files(wheel: Path) -> None:
    """Every file of the package is in the wheel, recipes and CUDA sources too, and nothing else."""
    package = ROOT / "src" / "gka"
    sources = {
        f"gka/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert "gka/recipes/cpu.toml" in sources
    assert names == sources


def test_the_source_distribution_holds_what_tests_and_documentation_need(sdist: Path) -> None:
    """Tests, documentation and the Makefile are in the source distribution."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_wheel.py", "docs/maths.md", "Makefile", "LICENSE", "README.md"} <= names
    assert {f"src/gka/recipes/{name}.toml" for name in ("cpu", "gpu")} <= names


def test_the_metadata_is_whole(wheel: Path) -> None:
    """The version is the package's, the README its description, every requirement and extra is there."""
    metadata = _metadata(wheel)
    assert (metadata["Name"], metadata["Version"]) == ("gated-kalmanet", gka.__version__)
    assert f"\nversion: {gka.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert metadata["License-Expression"] == SETTINGS["license"]
    required = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist", [])]
    for requirement in SETTINGS["dependencies"]:
        name = requirement.partition(">")[0]
        assert any(line.startswith(name) and "extra" not in line for line in required)
    assert set(metadata.get_all("Provides-Extra", [])) == set(SETTINGS["optional-dependencies"])


def test_commands_work_without_the_checkout(apart: Path, tmp_path: Path) -> None:
    """Outside a checkout: help and version, a recipe by name, a memory test, `python -m gka`."""
    assert " recall " in _run(apart, tmp_path, "gka", "--help").stdout
    shown = _run(apart, tmp_path, "python", "-m", "gka", "--version").stdout
    assert shown == f"gated-kalmanet {gka.__version__}\n"
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 500)
    few = ("--max-steps", "3", "--sequence-length", "32")
    _run(apart, tmp_path, "gka", "train", "a.txt", "--recipe", "cpu", *few)
    assert (tmp_path / "runs" / "cpu-gka" / "model" / "model.safetensors").is_file()
    options = ("--pairs", "4", "--correlation", "0.9", "--seeds", "1", "--head-dim", "16")
    _run(apart, tmp_path, "gka", "recall", "--output", "recall", *options)
    assert (tmp_path / "recall" / "recall.png").is_file()
