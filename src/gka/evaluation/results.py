"""What every result file says about where its numbers come from."""

import platform
from importlib.metadata import version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions and machine behind a measurement, JSON-ready."""
    return {
        "gated-kalmanet": version("gated-kalmanet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
