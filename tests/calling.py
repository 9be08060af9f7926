"""Commands called in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gka.commands import main as cli

Run = Callable[..., tuple[int, str, str]]
TINY_MODEL = [
    "--hidden-size=16",
    "--num-hidden-layers=1",
    "--num-heads=2",
    "--sequence-length=16",
    "--batch-size=2",
    "--set=model.num_iter=3",
    "--set=data.eval_fraction=0.3",
]


def call(*arguments: str | Path) -> int:
    """Exit status of `gka ARGUMENTS` in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return int(end.value.code or 0)
