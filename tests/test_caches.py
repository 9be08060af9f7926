"""Where caches are, and how they are turned off."""

from pathlib import Path

import pytest

from gka.caches import cache_folder, compiled_folder


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """$GKA_CACHE wins over $XDG_CACHE_HOME; GKA_COMPILE_CACHE=0 keeps nothing that was compiled."""
    monkeypatch.delenv("GKA_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("GKA_CACHE", raising=False)
    assert cache_folder() == Path("/x/gka")
    monkeypatch.setenv("GKA_CACHE", "/own")
    assert cache_folder() == Path("/own")
    assert compiled_folder() == Path("/own/compiled")
    monkeypatch.setenv("GKA_COMPILE_CACHE", "0")
    assert compiled_folder() is None
