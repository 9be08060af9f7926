"""Settings are what was written, or an error that names the key."""

import re
from pathlib import Path
from typing import Any

import pytest

from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.training import RunConfig, build_model, read_recipe
from gka.training.folder import resumed_config
from gka.training.priming import PrimeConfig
from gka.training.recipes import RECIPES, recipe_names
from gka.training.settings import merged


def test_tables_round_trip() -> None:
    """A run as tables and back is the same run; integers serve where a float is meant."""
    config = RunConfig.from_tables(
        {"data": {"text": ["a", "b"]}, "training": {"learning_rate": 1}, "model": {"num_iter": 5}}
    )
    assert RunConfig.from_tables(config.tables()) == config
    assert config.training.learning_rate == 1.0
    assert config.model["num_iter"] == 5


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"modle": {}}, "unknown key modle; known: data, model, training"),
        ({"data": {"txt": []}}, "unknown key data.txt; known: text, glob"),
        ({"training": {"lr": 1.0}}, "unknown key training.lr; known: max_steps"),
        ({"training": 3}, "training is 3; expected a table"),
        ({"training": {"max_steps": 1.5}}, "training.max_steps is 1.5; expected of type int"),
        ({"training": {"max_steps": True}}, "training.max_steps is True; expected of type int"),
        ({"training": {"max_steps": 0}}, "training.max_steps is 0; expected 1 or more"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1.0; expected above 0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is nan"),
        ({"training": {"learning_rate": float("inf")}}, "learning_rate is inf; expected a finite"),
        ({"training": {"weight_decay": float("nan")}}, "training.weight_decay is nan; expected 0"),
        (
            {"training": {"seed": 10**20 - 1}},
            "seed is 99999999999999999999; expected 4294967295 or",
        ),
        ({"training": {"max_steps": 10**30}}, "expected 2147483647 or less"),
        ({"data": {"sequence_length": 10**30}}, "expected 2147483647 or less"),
        ({"training": {"dtype": "half"}}, "training.dtype is 'half'; expected 'float32'"),
        ({"training": {"keep_checkpoints": 1}}, "training.keep_checkpoints is 1; expected 2"),
        ({"training": {"warmup_steps": -1}}, "training.warmup_steps is -1; expected 0 or more"),
        ({"data": {"text": "a.txt"}}, "data.text is 'a.txt'; expected a list of strings"),
        ({"data": {"sequence_length": 1}}, "data.sequence_length is 1; expected 2 or more"),
        ({"data": {"eval_fraction": 1.0}}, "data.eval_fraction is 1.0; expected between 0 and 1"),
        ({"model": {"mixer": "gka", "mixers": ["gla"]}}, "model.mixer and model.mixers both name"),
        ({"model": {"vocab_size": 9}}, "model.vocab_size is 9; expected absent"),
    ],
)
def test_bad_settings_are_named(tables: dict[str, Any], message: str) -> None:
    """Unknown tables and keys, wrong types and values out of range are refused by name."""
    with pytest.raises(InputError, match=re.escape(message)):
        RunConfig.from_tables(tables)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"ridge_ration": 0.1}, "ridge_ration"),
        ({"mixer": "rwkv"}, "rwkv"),
        ({"ridge_ratio": 0.0}, "ridge_ratio"),
        ({"num_iter": -1}, "num_iter"),
        ({"attention_layers": [7]}, "attention_layers"),
        ({"num_heads": 0}, "num_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_bad_models_are_named(model: dict[str, Any], message: str) -> None:
    """What GKAConfig refuses is an error of the [model] table that names the field."""
    with pytest.raises(InputError, match=rf"\[model\].*{message}"):
        build_model(RunConfig.from_tables({"model": model}), byte_tokenizer())


def test_mixers_give_the_number_of_layers() -> None:
    """A list of mixers needs no count beside it, and no default mixer contradicts it."""
    config = RunConfig.from_tables({"model": {"mixers": ["gka", "swa"], "hidden_size": 64}})
    model = build_model(config, byte_tokenizer())
    assert model.config.pattern == ["gka", "swa"]


def test_later_tables_win_key_by_key() -> None:
    """Options laid over a recipe change what they name and leave the rest."""
    assert merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}) == {
        "a": {"x": 1, "y": 3},
        "b": {"z": 4},
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_describe_runs(path: Path) -> None:
    """Every recipe in recipes/ is found by name, has known keys only, and makes a model or primes one."""
    import torch

    prime = path.stem.startswith("prime")
    tables = read_recipe(path.stem, "prime" if prime else "train")
    if "prime" in tables:
        config = PrimeConfig.from_tables(tables)
        assert config.stage1.max_steps and config.stage2.max_steps
        return
    tables["model"].pop("start", None)  # a folder that the user gives
    config = RunConfig.from_tables(tables)
    with torch.device("meta"):
        model = build_model(config, byte_tokenizer())
    assert model.num_parameters() > 0


def test_the_defaults_fit_a_laptop() -> None:
    """A bare run is the recipe cpu's; of one's own text, which may be short, 1 % is held out."""
    assert RunConfig.from_tables({}) == RunConfig.from_tables(read_recipe("cpu"))
    assert RunConfig.from_tables({"data": {"text": ["a"]}}).data.eval_fraction == 0.01


def test_recipes_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command lists its own recipes; one's own are found in ./recipes, and go before the package's."""
    monkeypatch.chdir(tmp_path)
    papers = ["1b", "2.8b", "2.8b-128k", "440m"]
    assert recipe_names("train") == [*papers, "cpu", "gpu", "hybrid"]
    assert recipe_names("prime") == ["prime-cpu", "prime-gpu"]
    (tmp_path / "recipes").mkdir()
    for name in ("cpu", "mine"):
        (tmp_path / "recipes" / f"{name}.toml").write_text("[training]\nmax_steps = 3\n")
        assert read_recipe(name) == {"training": {"max_steps": 3}}
    assert recipe_names("train") == [*papers, "cpu", "gpu", "hybrid", "mine"]


def test_unknown_recipes_are_refused(tmp_path: Path) -> None:
    """A name that is no recipe lists those there are; missing files and bad TOML are told."""
    with pytest.raises(InputError, match=r"recipe 'gpu9' is unknown; known: .*cpu"):
        read_recipe("gpu9")
    with pytest.raises(InputError, match=r"known: ((?!prime).)*; or give"):
        read_recipe("gpu9")
    with pytest.raises(InputError, match="is one of gka prime"):
        read_recipe("prime-cpu")
    with pytest.raises(InputError, match="no such file"):
        read_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(InputError, match=r"bad\.toml is not valid TOML"):
        read_recipe(str(tmp_path / "bad.toml"))


def test_resumed_runs_keep_their_settings(reference: tuple[Path, Any]) -> None:
    """Settings given again must agree; the first that differs is named with both values."""
    output, metrics = reference
    assert resumed_config(output, {}, RunConfig).tables() == metrics["config"]
    assert (
        resumed_config(output, {"training": {"max_steps": 12}}, RunConfig).training.max_steps == 12
    )
    with pytest.raises(InputError, match=r"training\.max_steps is 99, but .* began with 12"):
        resumed_config(output, {"training": {"max_steps": 99}}, RunConfig)
    with pytest.raises(InputError, match=r"model\.ridge_ratio is 0\.5, but .* began with None"):
        resumed_config(output, {"model": {"ridge_ratio": 0.5}}, RunConfig)


def test_damaged_run_settings_are_refused(tmp_path: Path) -> None:
    """run.json cut short, or of another format, is an error, not a fresh start."""
    (tmp_path / "run.json").write_text('{"format": 1')
    with pytest.raises(InputError, match=r"run\.json is not readable JSON"):
        resumed_config(tmp_path, {}, RunConfig)
    (tmp_path / "run.json").write_text('{"format": 99, "config": {}}')
    with pytest.raises(InputError, match="not a run of this version"):
        resumed_config(tmp_path, {}, RunConfig)
