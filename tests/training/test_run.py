"""A run trains what it was told to, and leaves a whole account of itself."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gka import console as consoles
from gka.data import byte_tokenizer, find_documents, pack, split
from gka.errors import InputError
from gka.layers import MIXERS
from gka.training import RunConfig, build_model, callbacks
from gka.training.settings import merged

Run = Callable[..., dict[str, Any]]
Reference = tuple[Path, dict[str, Any]]


def test_everything_a_run_leaves_is_there(reference: Reference) -> None:
    """Settings, model, figures and a plot are in the folder; metrics.json is what was returned."""
    output, metrics = reference
    stored = json.loads((output / "metrics.json").read_text())
    assert stored == {key: value for key, value in metrics.items() if key != "shown"}
    assert stored["config"] == json.loads((output / "run.json").read_text())["config"]
    assert {"torch", "transformers", "python"} <= stored["versions"].keys()
    assert stored["hardware"]["threads"] == torch.get_num_threads()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in stored["curves"]["evaluation"]] == [6, 12]
    assert stored["training"]["tokens"] == 12 * 2 * 16
    assert not list(output.glob(".*"))


def test_a_run_says_what_it_does_and_will_take(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is going to be done comes first, then, measured in the first steps, time and memory; where no
    terminal shows the moving line, lines say how far it is."""
    monkeypatch.setattr(callbacks.Estimate, "SHORT", 0.0)
    monkeypatch.setattr(callbacks.Estimate, "SECONDS", 0.0)
    monkeypatch.setattr(consoles, "LINE_SECONDS", 0.001)
    shown = run_tiny(tmp_path / "run")["shown"].splitlines()
    before, estimate, first = (
        next(i for i, line in enumerate(shown) if re.match(pattern, line))
        for pattern in (
            r"model: 1 gka, [\d,]+ parameters; 12 steps of 2 x 16 tokens, into ",
            r"about [\d.]+ (s|min): 10 more steps of \S+ s, 2 evaluations; [\d.]+ GiB of memory; Ctrl-C ",
            r"step      6  loss \d",
        )
    )
    assert before < estimate < first
    moving = r"step +\d+ of 12  loss [\d.]+  [\d,]+ tokens/s  \d+ s left"
    assert any(re.fullmatch(moving, line) for line in shown)


def test_a_short_run_has_no_estimate(reference: Reference) -> None:
    """Where a run takes seconds there is nothing to announce."""
    shown = reference[1]["shown"]
    assert "model: 1 gka" in shown and "more steps" not in shown and " left" not in shown


def test_reported_loss_is_the_saved_models(reference: Reference, text: Path) -> None:
    """The saved model, loaded by the Auto classes, has the reported held-out loss and bits per byte."""
    output, metrics = reference
    model = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    packed = pack(find_documents([str(text)]), tokenizer)
    held = split(packed, 0.2)[1]
    losses = []
    with torch.no_grad():
        for start, stop in held.ranges:  # each document by itself
            ids = torch.from_numpy(packed.tokens[start:stop].astype("int64"))[None]
            losses += [float(model(input_ids=ids, labels=ids).loss)] * (ids.shape[1] - 1)
    loss = sum(losses) / len(losses)
    assert metrics["evaluation"]["loss"] == pytest.approx(loss, rel=1e-5)
    per_byte = loss * held.tokens / held.bytes / torch.tensor(2.0).log().item()
    assert metrics["evaluation"]["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)


def test_training_lowers_the_loss(run_tiny: Run, tmp_path: Path) -> None:
    """On text that repeats itself the held-out loss falls by more than half."""
    metrics = run_tiny(tmp_path / "run", {"training": {"max_steps": 60, "save_steps": 60}})
    first, last = metrics["curves"]["training"][0]["loss"], metrics["evaluation"]["loss"]
    assert last < 0.5 * first


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_trains_with_the_same_budget(run_tiny: Run, tmp_path: Path, mixer: str) -> None:
    """Each comparison mixer trains on the same batches; the model is made of it."""
    short = {"max_steps": 2, "log_steps": 1}
    metrics = run_tiny(tmp_path / "run", {"model": {"mixer": mixer}, "training": short})
    assert metrics["model"]["mixers"] == f"1 {mixer}"
    assert metrics["training"]["tokens"] == 2 * 2 * 16
    # Bytes drawn from 257 at first: every mixer starts near the uniform distribution's loss.
    assert metrics["curves"]["training"][0]["loss"] == pytest.approx(5.55, abs=0.4)


def test_attention_layers_make_a_hybrid(run_tiny: Run, tmp_path: Path) -> None:
    """attention_layers replaces those layers' mixers."""
    model = {"num_hidden_layers": 3, "attention_layers": [1]}
    metrics = run_tiny(tmp_path / "run", {"model": model, "training": {"max_steps": 1}})
    assert metrics["model"]["mixers"] == "2 gka + 1 attention"


def test_accumulated_batches_equal_a_large_one(run_tiny: Run, tmp_path: Path) -> None:
    """Two forward passes of one block are a step of two blocks."""
    halves = {"batch_size": 1, "gradient_accumulation": 2, "max_steps": 4}
    whole = run_tiny(tmp_path / "whole", {"training": {"max_steps": 4}})
    split = run_tiny(tmp_path / "split", {"training": halves})
    assert split["training"]["tokens"] == whole["training"]["tokens"]
    assert split["evaluation"]["loss"] == pytest.approx(whole["evaluation"]["loss"], rel=1e-4)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_gradient_checkpointing_changes_memory_only(
    run_tiny: Run, tmp_path: Path, reference: Reference, how: str
) -> None:
    """Recomputing layers, or what is cheap in them, gives the same losses."""
    changes = {"training": {"gradient_checkpointing": how}}
    metrics = run_tiny(tmp_path / "run", changes)
    expected = reference[1]["evaluation"]["loss"]
    assert metrics["evaluation"]["loss"] == pytest.approx(expected, rel=1e-6)


def test_keep_states_reaches_the_layers(run_tiny: Run, tmp_path: Path) -> None:
    """[training] keep_states is refused by the first GKA layer on a CPU, whose backend keeps none."""
    with pytest.raises(InputError, match="keep_states=True needs the backend"):
        run_tiny(tmp_path / "run", {"training": {"keep_states": True}})


def test_bfloat16_is_autocast_over_float32_weights(
    run_tiny: Run, tmp_path: Path, reference: Reference
) -> None:
    """bfloat16 rounds the products (another loss, close by); the weights stay float32."""
    metrics = run_tiny(tmp_path / "run", {"training": {"dtype": "bfloat16"}})
    loss, expected = metrics["evaluation"]["loss"], reference[1]["evaluation"]["loss"]
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.float32


def test_seed_decides_the_weights(tables: dict[str, dict[str, Any]]) -> None:
    """The same seed gives the same untrained weights, another seed others."""
    states = [
        build_model(
            RunConfig.from_tables(merged(tables, {"training": {"seed": seed}})), byte_tokenizer()
        ).state_dict()
        for seed in (1, 1, 2)
    ]
    name = "model.embed_tokens.weight"
    assert all(states[0][key].equal(states[1][key]) for key in states[0])
    assert not states[0][name].equal(states[2][name])


def test_divergence_is_an_error_not_a_model(run_tiny: Run, tmp_path: Path) -> None:
    """A loss that is no number ends the run with advice; no checkpoint of it is kept."""
    absurd = {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0}
    with pytest.raises(InputError, match=r"diverged; lower learning_rate"):
        run_tiny(tmp_path / "run", {"training": absurd})
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_existing_run_is_not_overwritten(run_tiny: Run, reference: Reference) -> None:
    """A second run in the same folder is refused, and the first is untouched."""
    output, _ = reference
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    with pytest.raises(InputError, match="already holds a run; go on with --resume"):
        run_tiny(output)
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_overwrite_replaces_the_run_and_nothing_else(run_tiny: Run, tmp_path: Path) -> None:
    """--overwrite deletes what the former run wrote; a file of the user's beside it stays."""
    run_tiny(tmp_path / "run", {"training": {"max_steps": 4}})
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run_tiny(tmp_path / "run", {"training": {"max_steps": 2}}, overwrite=True)
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["checkpoint-2"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_foreign_folder_is_refused_even_to_overwrite(run_tiny: Run, tmp_path: Path) -> None:
    """A folder with files but no run is never written to."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty and holds no run"):
        run_tiny(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        run_tiny(tmp_path / "thesis.tex", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_settings_do_not_cost_the_former_run(run_tiny: Run, tmp_path: Path) -> None:
    """With --overwrite and settings that make no model, the former run is still there."""
    run_tiny(tmp_path / "run", {"training": {"max_steps": 1}})
    with pytest.raises(InputError, match=r"\[model\].*mixer"):
        run_tiny(tmp_path / "run", {"model": {"mixer": "rwkv"}}, overwrite=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
