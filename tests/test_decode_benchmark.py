"""The decoding benchmark, tried out on a CPU: what it checks, records and writes."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pictures import assert_drawn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.decode import bench

    return bench


def test_what_is_written(decode, tmp_path):
    """Every contender is checked; all repeats of it and of a copy are kept, with bytes and speed."""
    options = ["--output", str(tmp_path), "--device", "cpu", "--batches", "1", "2"]
    decode.main([*options, "--seconds", "0.01"])
    result = json.loads((tmp_path / "decode.json").read_text())
    (source,) = result["sources"]
    assert source["source"] == "artificial"
    assert len(source["checks"]) == 6 and all(c["ok"] for c in source["checks"].values())
    assert [part["batch"] for part in source["step"]] == [1, 2]
    names = {*source["checks"], "copy, U float32", "copy, U bfloat16"}
    for part in source["step"]:
        assert part["rows"].keys() == names
        assert 0 < part["adaptive_steps"] <= 30 and 0 < part["moved"] < 1e-3
        for name, row in part["rows"].items():
            repeats = [x for times in row["ms"] for x in times]
            assert row["min"] == min(repeats) <= row["median"] <= row["max"] == max(repeats)
            words = 4 + (4 if name.endswith("float32") else 2)
            assert row["bytes"] == 2 * part["batch"] * 2 * 16 * 16 * words
            assert row["gbps"] == pytest.approx(row["bytes"] / row["median"] / 1e6)
    table = (tmp_path / "decode.md").read_text()
    assert all(f"| {name} | " in table for name in names)
    assert_drawn(tmp_path / "decode.png")


def test_a_wrong_kernel_is_not_timed(decode, tmp_path, monkeypatch):
    """A contender whose result is off is named with its errors and left out."""
    right = decode.fused_recurrent_gka_

    def wrong(*args, **kwargs):
        o = right(*args, **kwargs)
        return o * 1.1 if kwargs["num_iter"] == 10 and kwargs["q"].dtype.itemsize == 2 else o

    monkeypatch.setattr(decode, "fused_recurrent_gka_", wrong)
    options = ["--output", str(tmp_path), "--device", "cpu", "--batches", "1"]
    decode.main([*options, "--seconds", "0.01"])
    (result,) = json.loads((tmp_path / "decode.json").read_text())["sources"]
    failed = {name for name, check in result["checks"].items() if not check["ok"]}
    assert failed == {f"torch, chebyshev 10, U {stored}" for stored in ("float32", "bfloat16")}
    assert not failed & result["step"][0]["rows"].keys()
    assert "not timed: torch, chebyshev 10, U float32" in (tmp_path / "decode.md").read_text()


def test_an_interrupted_run_leaves_what_is_finished(decode, tmp_path, monkeypatch):
    """decode.json has every check and batch size that was finished when the command was stopped."""
    step = decode.Bench.step

    def stopping(self, source, kernels, batch):
        if batch == 2:
            raise KeyboardInterrupt
        return step(self, source, kernels, batch)

    monkeypatch.setattr(decode.Bench, "step", stopping)
    options = ["--output", str(tmp_path), "--device", "cpu", "--batches", "1", "2"]
    with pytest.raises(KeyboardInterrupt):
        decode.main([*options, "--seconds", "0.01"])
    (source,) = json.loads((tmp_path / "decode.json").read_text())["sources"]
    assert len(source["checks"]) == 6 and [part["batch"] for part in source["step"]] == [1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's folder with a model of two GKA layers, the second with attention before it, and a text."""
    from gka.data import byte_tokenizer
    from gka.models import GKAConfig, GKAForCausalLM

    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=257, hidden_size=32, mixers=["gka", "attention", "gka"], num_hidden_layers=3,
        num_heads=4, num_kv_heads=2, head_dim=16, ridge_ratio=0.05, num_iter=8,
    )  # fmt: skip
    run = tmp_path_factory.mktemp("work") / "hybrid"
    model: Any = GKAForCausalLM(config)
    model.save_pretrained(run / "model")
    byte_tokenizer().save_pretrained(run / "model")
    (run / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(99)))
    return run


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("GKA_CACHE", str(tmp_path / "cache"))


def test_a_trained_model_beside_artificial_states(decode, folder, tmp_path, monkeypatch):
    """Its GKA layers with their own states are timed at every batch size, artificial states of its heads and
    layers too; kernels that do not take it are said to be not available."""
    few = [
        decode.DecodeKernel(backend, solve, "float32")
        for backend in ("torch", "hopper")
        for solve in ("chebyshev 10", "adaptive 30")
    ]
    monkeypatch.setattr(decode, "decode_kernels", lambda cuda: few)
    text = ["--model", str(folder), "--text", str(folder / "text.txt"), "--context", "128"]
    command = [
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
        "--batches",
        "1",
        "3",
        "--seconds",
        "0.01",
    ]
    decode.main([*command, *text])
    result = json.loads((tmp_path / "decode.json").read_text())
    assert result["command"] == (
        "python -m benchmarks.run decode --device cpu --batches 1 3 --seconds 0.01 "
        "--model hybrid --text text.txt --context 128"
    )
    artificial, trained = result["sources"]
    assert trained["source"] == "hybrid" and trained["shape"] == artificial["shape"]
    assert trained["shape"] == "4 heads (2 of keys, 2 of values), K = V = 16"
    assert trained["about"]["gka_layers"] == 2 and trained["about"]["ridge_ratio"] == 0.05
    page = (tmp_path / "decode.md").read_text()
    for source in result["sources"]:
        for name, check in source["checks"].items():
            assert check["ok"] == name.startswith("torch"), check
            assert check["ok"] or check["errors"].startswith("not available: ")
        for batch, part in zip((1, 3), source["step"], strict=True):
            assert (part["batch"], part["layers"]) == (batch, 2) and part["moved"] < 1e-3
            assert "torch, adaptive 30, U float32" in part["rows"]
            assert f" {part['adaptive_steps']:.1f} | " in page
            assert part["rows"]["copy, U float32"]["bytes"] == 2 * batch * 4 * 2 * 16 * 16 * 4
    one, two = trained["step"][1]["adaptive_steps_by_layer"]
    assert one != two
    assert page.count("- not timed: hopper, ") == 4
    assert "Trained model hybrid, " in page and "Artificial states and keys: 4 heads" in page


def test_a_layers_states_and_token_are_the_models_own(decode, folder):
    """The step of a layer's states by its token gives the states that the model has after reading all."""
    from gka.checkpoints.open import load_gka
    from gka.models import GKACache
    from gka.serving.tokens import prefill

    trained = importlib.import_module("benchmarks.decode.states")
    model: Any = load_gka(folder, dtype="float32", device="cpu")
    rows = torch.randint(256, (trained.READ + 2, 40), generator=torch.Generator().manual_seed(0))
    layers = trained.next_tokens(model, rows, 2)
    cache = GKACache(model.config)
    prefill(model, rows, cache)
    for index, layer in zip((0, 2), layers, strict=True):
        assert layer.token["gk"] is layer.token["g"] and layer.settings["ridge_ratio"] == 0.05
        few = layer[:2].token
        assert few["gk"] is few["g"] and few["k"].shape[0] == 2
        decode.fused_recurrent_gka_(**layer.token, state=layer.state, backend="torch")
        wanted: Any = cache.layers[index]
        for state, expected in zip(layer.state, wanted.recurrent_states.values(), strict=False):
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_sequences_come_from_different_places(decode, folder):
    """Evenly spaced over the text, which must be long enough."""
    trained = importlib.import_module("benchmarks.decode.states")
    rows, apart = trained.places(torch.arange(100), 4, 10)
    assert apart == 30 and rows[:, 0].tolist() == [0, 30, 60, 90] and rows[3, -1] == 99
    with pytest.raises(ValueError, match="100 tokens, too few for 3 sequences of 99"):
        trained.places(torch.arange(100), 3, 99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a"], "--text and --context are what a --model reads"),
        (["--context", "0"], "must be at least 1"),
    ],
)
def test_wrong_options_are_refused(decode, arguments, message, capsys):
    """Options that would do nothing, or make no sense, end the command with status 2."""
    with pytest.raises(SystemExit) as stop:
        decode.parse(["--output", "x", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_model_that_cannot_be_used_is_refused(decode, tmp_path):
    """A folder without a model ends the command in one line, before anything is timed."""
    with pytest.raises(SystemExit, match=r"holds no config\.json"):
        decode.main(
            ["--output", str(tmp_path), "--device", "cpu", "--model", str(tmp_path / "none")]
        )
