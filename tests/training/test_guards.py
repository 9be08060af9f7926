"""Bad steps are skipped, counted and reported; what a run writes while it trains says so."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from gka.training import RunConfig, build_model, read_recipe
from gka.training.guards import FEWEST, Guard, StepWatch
from gka.training.health import measure_health
from gka.training.recipes import recipe_names
from gka.training.start import check_given
from gka.training.telemetry import keep_lines
from gka.training.trainer import DecoderTrainer

Run = Callable[..., dict[str, Any]]
BIG = ("440m", "1b", "2.8b", "2.8b-128k", "hybrid")


def _plant(patch: pytest.MonkeyPatch, at: int, plant: Callable[[Any, Any], Any]) -> None:
    """Let `plant(trainer, loss)` return the loss of the step after `at` finished ones."""
    step = DecoderTrainer.training_step

    def planted(self: Any, *args: Any, **named: Any) -> Any:
        loss = step(self, *args, **named)
        return plant(self, loss) if self.state.global_step == at else loss

    patch.setattr(DecoderTrainer, "training_step", planted)


def _nan_gradient(trainer: Any, loss: Any) -> Any:
    next(trainer.model.parameters()).grad.fill_(math.nan)
    return loss


def _rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_nan_gradient_is_skipped_and_a_resumed_run_agrees(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted NaN gradient changes no weight; count, rates and end are those of a run resumed after it.

    The checkpoint that was due at that step comes with the next one."""
    _plant(monkeypatch, 3, _nan_gradient)
    whole = run_tiny(tmp_path / "whole", {"training": {"tensorboard": True}})
    assert "step 4 skipped: the gradient's norm is nan (1 so far)" in whole["shown"]
    rows = [row for row in _rows(tmp_path / "whole") if "loss" in row]
    assert [row["skipped"] for row in rows if row["step"] != 4][:2] == [0, 1]
    assert {row["skipped"] for row in rows if row["step"] > 3} == {1}
    assert rows[-1]["step"] == 12 and rows[-1]["tokens"] == 12 * 2 * 16
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "whole/checkpoints/checkpoint-8").is_dir()
    assert all(x.isfinite().all() for x in _weights(tmp_path / "whole").values())
    output = tmp_path / "resumed"
    _copy_unfinished(tmp_path / "whole", output)
    again = run_tiny(output, {"training": {"tensorboard": True}}, resume=True)
    assert "step 4 skipped" not in again["shown"]
    assert again["curves"]["training"][-1]["loss"] == whole["curves"]["training"][-1]["loss"]
    assert _rows(output)[-2]["skipped"] == 1
    assert all(torch.equal(x, _weights(output)[n]) for n, x in _weights(tmp_path / "whole").items())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("skipped")][-1] == 12


def _copy_unfinished(whole: Path, output: Path) -> None:
    """The run as it was after checkpoint 8, with the log as a killed process leaves it."""
    import shutil

    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "checkpoint-12")
    (output / "metrics.json").unlink()
    with (output / "log.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')


def test_skipped_step_leaves_weights_and_moments(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of infinity in the last step leaves what the step before made, and the loss that is logged."""
    changes = {"training": {"max_steps": 6, "save_steps": 5, "log_steps": 1}}
    _plant(monkeypatch, 5, lambda trainer, loss: trainer.watch.add(loss * math.inf))
    found = run_tiny(tmp_path / "run", changes)
    assert "step 6 skipped: the loss is inf" in found["shown"]
    before = load_file(tmp_path / "run/checkpoints/checkpoint-5/model.safetensors")
    assert all(torch.equal(x, _weights(tmp_path / "run")[name]) for name, x in before.items())
    steps = [
        torch.load(tmp_path / f"run/checkpoints/checkpoint-{n}/optimizer.pt")["state"][0]
        for n in (5, 6)
    ]
    assert float(steps[0]["step"]) == float(steps[1]["step"]) == 5.0
    assert torch.equal(steps[0]["exp_avg"], steps[1]["exp_avg"])
    losses = [row["loss"] for row in _rows(tmp_path / "run") if "loss" in row]
    assert math.isfinite(losses[-1])
    watch = StepWatch()
    assert [float(watch.add(torch.tensor(x))) for x in (2.0, math.nan)] == [2.0, 2.0]


def test_spikes_are_found_in_noise_and_end_a_run_that_has_too_many() -> None:
    """Of a noisy falling curve nothing is skipped; planted spikes are; the eleventh in 100 steps ends it."""
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 0.1
    guard = Guard(10.0, 10)
    for step, x in enumerate(noise.tolist(), 1):
        assert guard.judge(step, 3 + 5 / step + x, 1.0) is None
    assert "above" in (guard.judge(401, 5.0, 1.0) or "")
    again = Guard(10.0, 10)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and again.skipped == [401]
    for step in range(402, 411):
        again.judge(step, 5.0, 1.0)
    with pytest.raises(
        InputError, match=r"11 of the last 100 steps were skipped.*max_skipped = 10"
    ):
        again.judge(411, 5.0, 1.0)
    young = Guard(10.0, 10)
    assert all(young.judge(step, 2.0**step, 1.0) is None for step in range(1, FEWEST))
    never = Guard(0.0, 10)
    assert all(never.judge(step, 1.0 + (step == 99), 1.0) is None for step in range(1, 100))


@pytest.mark.parametrize("solver", ["chebyshev", "adaptive"])
def test_health_is_what_the_layers_states_are(solver: str) -> None:
    """Norms and lambda are of the states after the last token, gates of all tokens; nothing changes."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_heads": 2, "head_dim": 16, "vocab_size": 99}
    model = GKAForCausalLM(GKAConfig(mixers=["gka", "attention", "gka"], solver=solver, **sizes))
    model.train()
    ids = torch.randint(99, (1, 70))
    found = measure_health(model, ids)
    assert [row["layer"] for row in found] == [0, 2] and model.training
    past: Any = model.eval()(ids, use_cache=True).past_key_values
    h = past.layers[2].recurrent_states[0].norm(dim=(-2, -1)).mean()
    torch.testing.assert_close(torch.tensor(found[1]["norm_h"]), h)
    assert found[1]["lambda"] == pytest.approx(0.02 * found[1]["norm_h"])
    assert 0 < found[0]["decay"] < 1 and 0 < found[0]["alpha"] < 1
    steps = [row["solver_steps"] for row in found]
    assert steps == [30, 30] if solver == "chebyshev" else all(1 <= n <= 30 for n in steps)


def test_health_is_logged(run_tiny: Run, tmp_path: Path) -> None:
    """Every `health_steps` steps a line has a table for each Gated KalmaNet layer."""
    run_tiny(tmp_path / "run", {"training": {"max_steps": 4, "health_steps": 2}})
    rows = [row for row in _rows(tmp_path / "run") if "health" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert {"layer", "norm_h", "norm_u", "lambda", "decay", "solver_steps"} <= rows[0]["health"][
        0
    ].keys()


def test_lines_of_later_steps_go(tmp_path: Path) -> None:
    """Resuming at a step drops what came after it, and half a line; a new run starts an empty log."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"st')
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n'
    keep_lines(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("name", BIG)
def test_the_papers_recipes_build_and_step(name: str) -> None:
    """At a reduced width the model of a recipe is as it says, and takes a step; rates are the paper's."""
    tables = read_recipe(name)
    assert (
        RunConfig.from_tables(tables).training.warmup_steps
        == round(0.05 * tables["training"]["max_steps"])
        or name == "440m"
    )
    tables["model"] |= {"hidden_size": 8, "num_heads": 2, "num_iter": 2}
    tables["model"].pop("start", None)
    config = RunConfig.from_tables(tables)
    model = build_model(config, byte_tokenizer())
    assert len(model.config.pattern) == tables["model"]["num_hidden_layers"]
    assert model.config.pattern.count("attention") == (4 if name == "hybrid" else 0)
    assert (config.training.learning_rate, config.training.max_grad_norm) == (1e-3, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(256, (1, 16))
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert math.isfinite(float(model(ids, labels=ids).loss.detach()))


@pytest.mark.parametrize("name", BIG)
def test_recipes_without_a_corpus_ask_for_one(name: str) -> None:
    """Text and tokenizer that such a recipe does not bring are asked for, with an example."""
    assert name in recipe_names("train")
    tables = read_recipe(name)
    if "start" in tables["model"]:
        with pytest.raises(InputError, match=r"model.start: .*--start FOLDER"):
            check_given(RunConfig.from_tables(tables))
        tables["model"].pop("start")
    config = RunConfig.from_tables(tables)
    with pytest.raises(InputError, match=r"missing: text .* and a tokenizer .*gka train CORPUS/"):
        check_given(config)


def test_a_run_starts_from_a_saved_model(run_tiny: Run, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 it ends with those weights; other sizes are refused by name."""
    changes: dict[str, Any] = {"training": {"max_steps": 2, "learning_rate": 1e-30}}
    run_tiny(tmp_path / "first", {"training": {"max_steps": 2}})
    start: dict[str, Any] = {"start": str(tmp_path / "first")}
    changes["model"] = start
    run_tiny(tmp_path / "second", changes)
    first, second = (_weights(tmp_path / name) for name in ("first", "second"))
    assert all(torch.allclose(x, second[name]) for name, x in first.items())
    changes["model"] |= {"num_heads": 1}
    with pytest.raises(InputError, match=r"has num_heads = 2, and this run 1|head_dim"):
        run_tiny(tmp_path / "third", changes)
