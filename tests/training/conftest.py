"""A corpus, a run and a priming run small enough for a second or two, several epochs long."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gka.data import byte_tokenizer
from gka.models import GKAConfig, GKAForCausalLM
from gka.training import RunConfig, train
from gka.training.priming import PrimeConfig, prime
from gka.training.settings import merged

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
Prime = Callable[..., dict[str, Any]]
SIZES: dict[str, Any] = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2}


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


def tiny_transformer(**fields: Any) -> GKAForCausalLM:
    torch.manual_seed(0)
    settings = {"mixer": "attention", "num_hidden_layers": 4, "vocab_size": 257} | SIZES | fields
    return GKAForCausalLM(GKAConfig(**settings)).eval()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Transformer with sharp attention, and its tokenizer."""
    model, folder = (
        tiny_transformer(eos_token_id=256, pad_token_id=256),
        tmp_path_factory.mktemp("teacher"),
    )
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prime_tables(teacher: Path, text: Path) -> Tables:
    stage = {
        "max_steps": 6, "batch_size": 2, "learning_rate": 3e-3, "warmup_steps": 1, "log_steps": 1,
        "eval_steps": 3, "save_steps": 2,
    }  # fmt: skip
    return {
        "prime": {"teacher": str(teacher), "rank_window": 2},
        "mixer": {"num_iter": 4},
        "data": {"text": [str(text)], "sequence_length": 16, "eval_fraction": 0.2},
        "stage1": dict(stage),
        "stage2": dict(stage),
    }


@pytest.fixture(scope="session")
def run_prime(prime_tables: Tables) -> Prime:
    """Prime with tiny settings and changes to them."""

    def call(output: Path, changes: Tables | None = None, **options: Any) -> dict[str, Any]:
        config = PrimeConfig.from_tables(merged(prime_tables, changes or {}))
        return prime(config, output, console=Console(quiet=True), picture=False, **options)

    return call


@pytest.fixture(scope="session")
def primed(
    tmp_path_factory: pytest.TempPathFactory, run_prime: Prime
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, run_prime(output)
