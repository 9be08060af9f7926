"""Before anything imports triton: without a GPU its interpreter runs the kernels."""

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
