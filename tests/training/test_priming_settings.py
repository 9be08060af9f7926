"""Priming settings are what was written, or an error that names what is wrong, before any work."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gka.commands.main import main
from gka.commands.prime import _with_tokens
from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM

Tables = dict[str, dict[str, Any]]
Prime = Callable[..., dict[str, Any]]
NO_TRAINING: Tables = {"stage1": {"max_steps": 0}, "stage2": {"max_steps": 0}}


def tiny(**fields: Any) -> GKAForCausalLM:
    """An untrained Transformer of four layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2}
    settings = {"mixer": "attention", "num_hidden_layers": 4, "vocab_size": 257}
    return GKAForCausalLM(GKAConfig(**{**settings, **sizes, **fields})).eval()


def test_tokens_become_steps() -> None:
    """--stage1-tokens is rounded up to steps of batches, and excludes steps."""
    given = {"data": {"sequence_length": 100}, "stage1": {"batch_size": 3}}
    tokens = {"stage1": 901, "stage2": None}
    assert _with_tokens(given, tokens)["stage1"]["max_steps"] == 4
    given["stage1"]["max_steps"] = 5
    with pytest.raises(InputError, match=r"--stage1-tokens and .* exclude each other"):
        _with_tokens(given, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prime": {"teacher": "/nowhere"}}, "teacher: model /nowhere holds no config.json"),
        ({"prime": {"layers": "4"}}, "layer 4 lies outside the 4 layers"),
        (
            {"prime": {"layers": "a,b"}},
            "prime.layers is 'a,b'; expected every-other, rank, or numbers",
        ),
        ({"prime": {"layers": "rank", "count": 5}}, "prime.count is 5, but the teacher has 4"),
        ({"prime": {"count": 1}}, "prime.count goes with layers = 'rank'"),
        ({"prime": {"alpha": 1.0}}, "prime.alpha is 1.0; expected between 0 and 1"),
        ({"prime": {"decay": 0.0}}, "prime.decay is 0.0; expected above 0"),
        ({"prime": {"mixer": "rwkv"}}, "mixer is 'rwkv'"),
        ({"mixer": {"num_itre": 3}}, "has no option 'num_itre'"),
        ({"data": {"sequence_length": 100000}}, "fewer than sequence_length = 100000"),
        ({"data": {"tokenizer": "/nowhere"}}, "tokenizer '/nowhere' cannot be loaded"),
        ({"data": {"chat": ["a.jsonl"]}}, "data.chat and data.text exclude each other"),
        (
            {"stage1": {"layer_weight": 0.0}},
            "stage1.layer_weight is 0.0; expected above 0, or end_weight",
        ),
        ({"stage2": {"kl_weight": -1.0}}, "stage2.kl_weight is -1.0; expected 0 or more"),
        ({"stage2": {"max_steps": -1}}, "stage2.max_steps is -1; expected 0 or more"),
        ({"stage3": {}}, "unknown key stage3; known: prime, mixer, data, stage1, stage2"),
    ],
)
def test_unusable_settings_are_refused_at_once(
    run_prime: Prime, tmp_path: Path, changes: Tables, message: str
) -> None:
    """What cannot work is told before anything is trained or written."""
    with pytest.raises(InputError, match=re.escape(message)):
        run_prime(tmp_path / "run", changes)
    assert not list(tmp_path.rglob("*.*"))


def test_unusable_teachers_are_refused(run_prime: Prime, teacher: Path, tmp_path: Path) -> None:
    """A model without attention layers, and a folder without a tokenizer, are named as such."""
    tiny(mixer="gla").save_pretrained(tmp_path / "gla")
    with pytest.raises(InputError, match="no attention layers to replace: its layers are gla"):
        run_prime(tmp_path / "run", {"prime": {"teacher": str(tmp_path / "gla")}})
    GKAForCausalLM.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="holds no tokenizer; name its tokenizer with --tokenizer"):
        run_prime(tmp_path / "run", {"prime": {"teacher": str(tmp_path / "bare")}})
    small = tiny(vocab_size=100)
    small.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(
        InputError, match="has 257 ids, the teacher 100; it must be the teacher's own"
    ):
        run_prime(tmp_path / "run", {"prime": {"teacher": str(tmp_path / "small")}})


def test_adapters_need_peft(
    run_prime: Prime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package, adapters are refused before any training, with what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package peft: pip install peft"):
        run_prime(tmp_path / "run", {"stage2": {"lora_rank": 2}})


def test_the_command_runs_resumes_and_refuses(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gka prime` leaves a hybrid, --resume leaves a complete run alone, bad input ends with status 2."""
    output = tmp_path / "run"
    sizes = [
        "--sequence-length",
        "16",
        "--batch-size",
        "2",
        "--stage1-max-steps",
        "2",
        "--stage2-tokens",
        "64",
    ]
    rest = ["--set", "data.eval_fraction=0.2", "--set", "mixer.num_iter=4", "--output", str(output)]
    command = ["prime", str(teacher), "--layers", "1,2", "--text", str(text), *sizes, *rest]
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    assert "after stage 2" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["layers"] == [1, 2]
    assert metrics["stages"]["stage2"]["steps"] == 2
    assert (output / "report" / "priming.png").exists()
    for again in ([*command, "--resume"], ["prime", "--resume", "--output", str(output)]):
        with pytest.raises(SystemExit) as done:
            main(again)
        assert done.value.code == 0
        assert "there is nothing to" in capsys.readouterr().out
    for wrong, message in (
        (["prime"], "no teacher: give"),
        (["prime", "/nowhere"], "no config.json"),
    ):
        with pytest.raises(SystemExit) as done:
            main(wrong)
        assert done.value.code == 2
        assert message in capsys.readouterr().err
