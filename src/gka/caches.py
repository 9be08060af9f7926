"""Folders of what can be made again: packed corpora, compiled kernels and graphs."""

import os
from pathlib import Path

from gka.errors import InputError


def cache_folder() -> Path:
    """$GKA_CACHE, else $XDG_CACHE_HOME/gka, else ~/.cache/gka."""
    if own := os.environ.get("GKA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gka"


def compiled_folder() -> Path | None:
    """Folder of compiled code inside `cache_folder()`; None if GKA_COMPILE_CACHE is 0.

    Raises:
        InputError: GKA_COMPILE_CACHE is neither 0 nor 1.
    """
    wanted = os.environ.get("GKA_COMPILE_CACHE") or "1"
    if wanted not in ("0", "1"):
        raise InputError(
            f"GKA_COMPILE_CACHE is {wanted!r}; expected 1 (keep compiled code on disk) or 0 (do not)"
        )
    return cache_folder() / "compiled" if wanted == "1" else None
