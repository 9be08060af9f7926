"""Weight decay applies to matrices only, as the groups of the real optimizer show."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from gka.data import byte_tokenizer
from gka.layers import decayed_parameters
from gka.training import RunConfig, TrainingConfig, build_model
from gka.training.settings import merged
from gka.training.trainer import DecoderTrainer, SelectiveDecay, arguments


def _model(tables: dict[str, dict[str, Any]], **changes: Any) -> Any:
    return build_model(RunConfig.from_tables(merged(tables, {"model": changes})), byte_tokenizer())


def _trainer(model: Any, config: TrainingConfig, folder: Path) -> DecoderTrainer:
    nothing: Any = []
    return DecoderTrainer(model=model, args=arguments(config, folder), eval_dataset=nothing)


def test_what_is_not_decayed_parameters(tables: dict[str, dict[str, Any]]) -> None:
    """A_log, dt_bias, norms, biases and embeddings are not; projections, filters, the head are."""
    model = _model(tables, tie_word_embeddings=False)
    names = set(decayed_parameters(model))
    rest = {name for name, _ in model.named_parameters()} - names
    ends = {name.split("mixer.")[-1] for name in names if "mixer." in name}
    assert {"q_proj.weight", "b_proj.weight", "q_conv1d.weight", "o_proj.weight"} <= ends
    assert {"lm_head.weight", "model.layers.0.mlp.gate_proj.weight"} <= names
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= rest
    for end in ("A_log", "dt_bias", "b_proj.bias", "alpha_proj.bias", "o_norm.weight"):
        assert f"model.layers.0.mixer.{end}" in rest


def test_tied_output_is_an_embedding(tables: dict[str, dict[str, Any]]) -> None:
    """A matrix shared by embedding and output is not decayed."""
    names = decayed_parameters(_model(tables, tie_word_embeddings=True))
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(names)


def test_the_optimizer_uses_it(tables: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The Trainer's optimizer decays exactly these parameters, at the given rate."""
    model = _model(tables)
    trainer = _trainer(model, TrainingConfig(), tmp_path)
    groups = {g["weight_decay"]: g["params"] for g in trainer.create_optimizer().param_groups}
    names = {id(p): name for name, p in model.named_parameters()}
    assert groups.keys() == {TrainingConfig.weight_decay, 0.0}
    assert {names[id(p)] for p in groups[TrainingConfig.weight_decay]} == set(
        decayed_parameters(model)
    )
    assert sum(map(len, groups.values())) == len(names)


def test_selective_decay_fits_any_trainer(
    tables: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Before a Trainer subclass it takes A_log out of the decay that transformers alone would give it."""

    class Theirs(Trainer):
        pass

    class Ours(SelectiveDecay, Theirs):
        pass

    model = _model(tables)
    args = arguments(TrainingConfig(), tmp_path)
    given: Any = {"model": model, "args": args, "eval_dataset": []}
    a_logs = {name for name, _ in model.named_parameters() if name.endswith("A_log")}
    assert a_logs <= set(Theirs(**given).get_decay_parameter_names(model))
    assert not a_logs & set(Ours(**given).get_decay_parameter_names(model))


@pytest.mark.parametrize("steps", [1, 5])
def test_the_rate_warms_up_and_falls_to_zero(
    tables: dict[str, dict[str, Any]], tmp_path: Path, steps: int
) -> None:
    """Linear to the highest rate, then half a cosine to zero at max_steps."""
    config = TrainingConfig(max_steps=4 * steps, warmup_steps=2 * steps, learning_rate=0.5)
    trainer = _trainer(_model(tables), config, tmp_path)
    optimizer = trainer.create_optimizer()
    schedule: Any = trainer.create_scheduler(config.max_steps, optimizer)
    rate = schedule.lr_lambdas[0]
    assert [rate(i * steps) for i in range(5)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
