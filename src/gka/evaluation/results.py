"""How measurements are run, and what every result file says about where its numbers come from."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
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
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one CPU thread, as operations on matrices this small are done before others wake up;
    on a busy machine threads that wait for each other cost ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
