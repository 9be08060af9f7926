"""What the tests of commands share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from calling import Run, call


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of packed text for the module, and a wide terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture
def gka(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command: its status, what it printed, and its errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = call(*arguments)
        out, err = capfd.readouterr()
        return status, out, err

    return run
