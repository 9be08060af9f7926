"""The tiny models of tests/models."""

from models.conftest import build, ids

__all__ = ["build", "ids"]
