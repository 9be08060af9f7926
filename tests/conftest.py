"""Before anything imports triton: without a GPU its interpreter runs the kernels. Tests marked `gpu` are
skipped where there is no GPU, those marked `slow` unless asked for; both say so."""

import os

import pytest
import torch

# Tests compile what they test, and leave nothing in the user's cache.
os.environ.setdefault("GKA_COMPILE_CACHE", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Make transformers' markers known where its tests are run (tests/models/common.py)."""
    if os.environ.get("GKA_TRANSFORMERS_TESTS"):
        from models.common import markers

        for name in markers():
            config.addinivalue_line("markers", f"{name}: of transformers' tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:
        skip_slow(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make test-gpu)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def skip_slow(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes long (pytest -m slow)"))
