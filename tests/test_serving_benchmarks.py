"""The benchmarks of prefill and generation measure and write what they say, tiny."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pictures import assert_drawn

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "num_iter": 4}


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"benchmarks.{name}")


def test_prefill_measures_every_length_and_chunk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Speed, memory and the times of resuming for each length and chunk, behind checks that passed."""
    prefill = module("model.prefill", monkeypatch)
    monkeypatch.setitem(prefill.registry.MODELS, "tiny", TINY)
    command = "prefill --size tiny --tokens 200 400 --chunk 64 --repeats 2 --device cpu --output"
    monkeypatch.setattr("sys.argv", [*command.split(), str(tmp_path)])
    prefill.main()
    found = json.loads((tmp_path / "prefill.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [200, 400]
    assert all(row["seconds"] > 0 and len(row["load"]) == 2 for row in found["rows"])
    assert found["rows"][0]["megabytes"] == pytest.approx(found["rows"][1]["megabytes"], rel=1e-3)
    assert found["errors"]["resumed"] == 0 and found["device"] == "CPU"
    assert "tokens/s" in capsys.readouterr().out


def test_prefill_checks_before_it_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pieces that change the result end the benchmark instead of being timed."""
    prefill = module("model.prefill", monkeypatch)
    monkeypatch.setitem(prefill.registry.MODELS, "tiny", TINY)
    model = prefill.registry.model("tiny", torch.float32, "cpu", None)
    whole = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids, **rest: whole(input_ids.flip(1), **rest)
    )
    with pytest.raises(RuntimeError, match="pieces: relative error"):
        prefill.check(model, tmp_path)


def test_generation_measures_every_way_and_context(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each contender at each context, with repeats and memory, stored row by row; why nothing was recorded
    is told."""
    generation = module("model.generation", monkeypatch)
    monkeypatch.setitem(generation.registry.MODELS, "tiny", TINY)
    command = "--device cpu --size tiny --contexts 40 20 --batch 2 --tokens 5 --output"
    generation.main([*command.split(), str(tmp_path)])
    found = json.loads((tmp_path / "generation.json").read_text())
    names = ("gka, launched", "attention, launched", "attention, floor")
    rows = {(row["name"], row["context"]): row for row in found["rows"]}
    assert set(rows) == {(name, context) for name in names for context in (20, 40)}
    for (name, context), row in rows.items():
        assert len(row["seconds"]) == (1 if name.endswith("floor") else 3)
        assert row["min"] <= row["median"] <= row["max"]
        assert row["tokens"] == (5 if name.endswith("floor") else 2)  # launched: a quarter
        assert row["median"] in [pytest.approx(2 * row["tokens"] / x) for x in row["seconds"]]
        # keys and values of 2 rows in 2 layers, and H, U and 3 convolutions of 4 inputs
        size = (
            2 * 2 * 2 * context * 32
            if "attention" in name
            else 2 * 2 * (2 * 2 * 16 * 16 + 3 * 32 * 4)
        )
        assert row["state_bytes"] == 4 * size
    floor = rows["attention, floor", 40]
    assert floor["median"] == pytest.approx(
        10 / (5 * floor["state_bytes"] / found["copy_gbps"] / 1e9)
    )
    assert all(check["ok"] for check in found["checks"].values()) and len(found["checks"]) == 2
    table = (tmp_path / "generation.md").read_text()
    assert all(f"| {name} | " in table for name in names) and "the model is on cpu" in table
    assert "tokens/s" in capsys.readouterr().out
    assert_drawn(tmp_path / "generation.png")


def test_generation_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Keys that are not all attended to end the benchmark."""
    generation = module("model.generation", monkeypatch)
    monkeypatch.setitem(generation.registry.MODELS, "tiny", TINY)
    update = generation.KeysAndValues.update

    def forgetful(self: Any, *rest: Any) -> Any:
        keys, values = update(self, *rest)
        return keys, values * 0.9 if self.length else values

    monkeypatch.setattr(generation.KeysAndValues, "update", forgetful)
    command = "--device cpu --size tiny --contexts 20 --tokens 3 --output"
    with pytest.raises(RuntimeError, match="attention: logits differ"):
        generation.main([*command.split(), str(tmp_path)])
