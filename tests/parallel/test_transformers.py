"""Models that transformers splits over processes (`tp_plan="auto"`) equal those of one process."""

from pathlib import Path
from typing import Any

import pytest

from parallel.jobs import run_ranks

pytest.importorskip("accelerate")
MODELS = ("mixers", "untied", "odd vocabulary")


def check(told: dict[str, Any], ranks: int) -> None:
    for name in MODELS:
        assert told[name] < 1e-12
        assert told[f"{name}: saved"]
    assert told["mixers: local"] < told["mixers: all"] * (1.1 / ranks + 0.1)
    assert told["accelerate"] < 1e-12
    assert told["parallelize"] < 1e-12
    assert f"tp = {ranks}: layer 0 cannot be split: 3 heads" in told["refused"]
    assert told["warned"] == []


def test_two_ranks(tmp_path: Path) -> None:
    """In float64 logits, generated tokens, losses and all gradients of every mixer are one process's within
    1e-12, and so are AdamW steps through accelerate. `save_pretrained` writes whole weights, bit for bit.
    Heads that do not divide are refused."""
    check(run_ranks("on_transformers.py", 2, str(tmp_path / "found.json"), str(tmp_path)), 2)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    """The same with fewer key and value heads than ranks."""
    check(run_ranks("on_transformers.py", 4, str(tmp_path / "found.json"), str(tmp_path)), 4)
