"""Where caches are, and how they are turned off."""

from pathlib import Path

import pytest

from gka.caches import cache_folder, compiled_folder
from gka.errors import InputError


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """$GKA_CACHE wins over $XDG_CACHE_HOME. GKA_COMPILE_CACHE=0 keeps nothing that was compiled; any other
    value than 0 or 1 is refused."""
    monkeypatch.delenv("GKA_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("GKA_CACHE", raising=False)
    assert cache_folder() == Path("/x/gka")
    monkeypatch.setenv("GKA_CACHE", "/own")
    assert cache_folder() == Path("/own")
    assert compiled_folder() == Path("/own/compiled")
    monkeypatch.setenv("GKA_COMPILE_CACHE", "0")
    assert compiled_folder() is None
    monkeypatch.setenv("GKA_COMPILE_CACHE", "no")
    with pytest.raises(InputError, match=r"GKA_COMPILE_CACHE is 'no'; expected 1 .* or 0"):
        compiled_folder()
