"""Folders of what can be made again: packed corpora, compiled kernels and graphs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$GKA_CACHE, else $XDG_CACHE_HOME/gka, else ~/.cache/gka."""
    if own := os.environ.get("GKA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gka"


def compiled_folder() -> Path | None:
    """Folder of compiled code inside `cache_folder()`; None if GKA_COMPILE_CACHE=0 turns it off."""
    if os.environ.get("GKA_COMPILE_CACHE") == "0":
        return None
    return cache_folder() / "compiled"
