"""Imports run downwards only, and never in a circle; those inside functions and for types count too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter reads the imports")
from house.circles import PACKAGES, ROOT, circles


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No module of the package reaches itself by imports."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = circles(package)
    assert not found, "\n\n".join(map(str, found))


def test_contracts_are_kept() -> None:
    """pyproject.toml's contracts hold of this checkout: `make imports`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    told = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr


PLANTED = {
    "": "from planted import a\n",
    "a": "def f():\n    from planted.inner.b import g\n    return g\n",
    "inner/": "from planted.inner import b\n",
    "inner/b": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from planted import c\n",
    "c": "import planted.a\n",
    "beside": "from planted.inner import b\n",
}
CIRCLE = ("planted.a", "planted.c", "planted.inner.b")


def plant(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        file = (
            folder / "planted" / (f"{name}__init__.py" if name in ("", "inner/") else f"{name}.py")
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_planted_circle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an import in a function, one for types only and one at the top; each is told with its line."""
    plant(tmp_path, PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = circles("planted")
    assert found.modules == CIRCLE
    assert found.lines == (
        "planted.a:2 -> planted.inner.b",
        "planted.c:1 -> planted.a",
        "planted.inner.b:4 -> planted.c",
    )


def test_packages_that_gather_names_are_no_circles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one of the circle's imports gone none is left, though packages import their modules."""
    plant(tmp_path, PLANTED | {"c": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert circles("planted") == []
