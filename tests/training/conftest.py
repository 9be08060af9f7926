"""A corpus and a run small enough to train within a second, several epochs long."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gka.training import RunConfig, train
from gka.training.config import merged

TINY = {
    "data": {"sequence_length": 16, "eval_fraction": 0.2},
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "num_iter": 4},
    "training": {
        "max_steps": 12,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "log_steps": 3,
        "eval_steps": 6,
        "save_steps": 4,
        "seed": 3,
    },
}

Tables = dict[str, dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Packed tokens of these tests go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen documents of 13 tokens: 8 blocks to train on, so 4 steps of 2 are an epoch."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(14):
        (folder / f"{i:02}.txt").write_text(f"one two {i:03}\n")
    return folder


@pytest.fixture(scope="session")
def tables(text: Path) -> Tables:
    """Settings of a tiny run."""
    return merged(TINY, {"data": {"text": [str(text)]}})


@pytest.fixture(scope="session")
def run_tiny(tables: Tables) -> Callable[..., dict[str, Any]]:
    """Train with the tiny settings and changes to them; what was shown is under "shown"."""

    def run(output: Path, changes: Tables | None = None, **options: Any) -> dict[str, Any]:
        config = RunConfig.from_tables(merged(tables, changes or {}))
        shown = io.StringIO()
        try:
            metrics = train(config, output, console=Console(file=shown, width=400), **options)
        except Exception as error:
            error.add_note(shown.getvalue())
            raise
        return {**metrics, "shown": shown.getvalue()}

    return run


@pytest.fixture(scope="session")
def reference(
    tmp_path_factory: pytest.TempPathFactory, run_tiny: Callable[..., dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Folder and metrics of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("reference") / "run"
    return output, run_tiny(output)
