"""The op's inputs from a trained model, tried out on a CPU: training, memory, which heads, the op's table."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gka.errors import InputError
from pictures import assert_drawn

ROOT = Path(__file__).parents[1]
TEXT = "def double(x):\n    return 2 * x  # {}\n"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.run")


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory) -> Path:
    """What the command leaves; it is called a second time and trains nothing then."""
    base = tmp_path_factory.mktemp("heads")
    (base / "text").mkdir()
    for name in "abcd":
        (base / "text" / f"{name}.py").write_text(TEXT.format(name) * 40)
    output = base / "bench-heads"
    words = ["--device", "cpu", "--size", "tiny", "--text", str(base / "text")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKA_CACHE", str(base / "cache"))
        for _ in range(2):
            bench.main(["heads", *words, "--output", str(output)])
    return output


@pytest.fixture
def trained(bench):
    return importlib.import_module("benchmarks.op.trained")


@pytest.fixture
def heads(trained, folder):
    return trained.TrainedHeads(folder / "run", "cpu")


def test_what_is_written(folder):
    """The memory of every head by layer, its histogram, and what the model is."""
    found = json.loads((folder / "heads.json").read_text())
    assert (found["layers"], found["heads"], found["dim"]) == (2, 2, 32)
    assert torch.tensor(found["memory_tokens"]).shape == (2, 2)
    assert sum(found["histogram"]) == 4 and found["training"]["steps"] == 3
    page = (folder / "heads.md").read_text()
    assert "| layer 1 |" in page and "| all |" in page and str(folder) not in page
    assert_drawn(folder / "heads.png")


def test_inputs_are_the_layers_own(trained, heads):
    """The op on them gives what a layer's op gave, for the heads that were chosen."""
    size = trained.Size(2, 70, 4, 32)
    given = heads.inputs(size)
    rows, _ = trained.places(heads.ids, 2, 70)
    with torch.no_grad(), trained.watched() as seen:
        heads.model.model(input_ids=rows, use_cache=False)
    order = trained.spread(heads.memory.flatten(), 4)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    for name in ("q", "k", "v", "g", "alpha", "beta"):
        x = getattr(given, name)
        assert x.requires_grad and x.is_contiguous() and x.is_leaf
        for place, head in enumerate(order.tolist()):
            torch.testing.assert_close(
                x[:, :, place].float(), seen[head // 2][name][:, :, head % 2].float()
            )
    assert given.q.dtype == torch.bfloat16 and given.g.dtype == torch.float32
    assert given.do.shape == given.v.shape and given.lamb.shape == (4, 32)


def test_memory(trained):
    """1/e after 1/|g| tokens; without a decay after 1e9, the most that is told."""
    g = torch.tensor([-0.5, -0.004, 0.0, -2.0]).repeat(1, 9, 1)
    memory = trained.Heads(*(g for _ in range(6))).memory()
    assert memory.tolist() == pytest.approx([2.0, 250.0, 1e9, 0.5])
    assert trained.histogram(memory) == [1, 1, 0, 0, 0, 1, 0, 1]
    assert len(trained.head_of_histogram()) == 8


def test_a_part_of_the_heads_keeps_the_mix(trained):
    """Heads are taken at equal distances in the order of their memory."""
    memory = torch.tensor([100.0, 1.0, 1000.0, 10.0, 2.0, 200.0, 20.0, 2000.0])
    assert memory[trained.spread(memory, 4)].tolist() == [2.0, 20.0, 200.0, 2000.0]
    assert memory[trained.spread(memory, 8)].tolist() == sorted(memory.tolist())


def test_the_op_is_measured_on_them(bench, folder, tmp_path, capsys):
    """`op --keys trained` measures sizes that the model has, says of others why not, and shows the
    histogram."""
    words = [
        "--device",
        "cpu",
        "--keys",
        "trained",
        "--model",
        str(folder / "run"),
        "--peers",
        "none",
    ]
    more = ["--sizes", "1x96x4,1x96x5", "--dims", "32", "--seconds", "0.01", "--no-layer"]
    bench.main(["op", *words, *more, "--output", str(tmp_path)])
    assert "by tokens that they remember: " in capsys.readouterr().out
    found = json.loads((tmp_path / "op.json").read_text())
    first, second = (group["contenders"]["chunk_gka, adaptive"] for group in found["groups"])
    assert first["status"] == "ok" and second["status"] == "not run"
    assert "has 4 heads of 32; asked for 5 of 32" in second["message"]
    page = (tmp_path / "op.md").read_text()
    assert "keys: trained" in page and "Heads by tokens that they remember: " in page
    assert str(folder) not in found["command"] and found["trained"]["histogram"]


def test_what_cannot_be_read_is_refused(bench, trained, tmp_path, capsys):
    """A folder without a finished run names the command that makes one; --model alone does nothing."""
    with pytest.raises(InputError, match=r"train one: python -m benchmarks.run heads"):
        trained.TrainedHeads(tmp_path, "cpu")
    with pytest.raises(SystemExit) as stop:
        bench.main(["op", "--device", "cpu", "--model", str(tmp_path)])
    assert stop.value.code == 2 and "what --keys trained reads" in capsys.readouterr().err


def test_layers_that_do_not_fit_are_refused(trained):
    """Models without GKA layers, or with shared key heads."""
    from gka.models import GKAConfig, GKAForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 32, "num_heads": 2, "head_dim": 16, "num_hidden_layers": 1,
    }  # fmt: skip
    changes: list[tuple[dict[str, Any], str]] = [
        ({"mixer": "attention"}, "no GKA layer"), ({"num_kv_heads": 1}, "share key heads"),
    ]  # fmt: skip
    for change, message in changes:
        model = GKAForCausalLM(GKAConfig(**(fields | change)))
        with pytest.raises(InputError, match=message):
            trained.read(model, torch.ones(1, 5, dtype=torch.long))
