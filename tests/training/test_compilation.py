"""A compiled run trains as an uncompiled one does, says so, and never falls back in silence."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.training import RunConfig, build_model, compilation
from gka.training.settings import merged

Run = Callable[..., dict[str, Any]]
Reference = tuple[Path, dict[str, Any]]
Tables = dict[str, dict[str, Any]]
LAYERS: Tables = {"training": {"compile": "layers"}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and differentiated, but no C++ is made of them."""
    torch.compiler.reset()
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))


def _losses(metrics: dict[str, Any]) -> list[float]:
    return [row["loss"] for part in ("training", "evaluation") for row in metrics["curves"][part]]


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": "layers"}, {"compile": "model"},
        {"compile": "layers", "gradient_checkpointing": True, "dtype": "bfloat16"},
        {"compile": "model", "gradient_checkpointing": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_compiled_run_is_the_run(
    run_tiny: Run, reference: Reference, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Layers or model, with recomputation and in bfloat16: the losses of the uncompiled run, and its names in
    the checkpoints and the model; two lines say that it compiles and what that took."""
    output = tmp_path / "run"
    metrics = run_tiny(output, {"training": changes})
    assert metrics["training"]["compiled"] == changes["compile"]
    close = 2e-2 if "dtype" in changes else 1e-5
    assert _losses(metrics) == pytest.approx(_losses(reference[1]), rel=close)
    for name in ("model/model.safetensors", "checkpoints/checkpoint-12/model.safetensors"):
        ours, plain = (load_file(folder / name) for folder in (output, reference[0]))
        assert ours.keys() == plain.keys()
    assert re.search(r"compiling .* during the first step \(--compile off: ", metrics["shown"])
    assert re.search(r"first step: [\d.]+ s; 1 graph compiled, 0 read ", metrics["shown"])


def test_a_resumed_compiled_run_ends_where_an_undisturbed_one_does(
    run_tiny: Run, tmp_path: Path
) -> None:
    """From checkpoint-8, bit for bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    undisturbed = run_tiny(whole, LAYERS)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/checkpoint-12")
    (resumed / "metrics.json").unlink()
    metrics = run_tiny(resumed, LAYERS, resume=True)
    assert _losses(metrics) == _losses(undisturbed)
    weights = [load_file(folder / "model/model.safetensors") for folder in (whole, resumed)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_nothing_is_compiled_after_the_first_step(run_tiny: Run, tmp_path: Path) -> None:
    """Every training batch has one shape, also where an epoch ends with less than a batch, and evaluations
    run uncompiled: one graph is all, over epochs of 8 blocks in batches of 3."""
    before = compilation.graphs()["compiled"]
    run_tiny(tmp_path / "run", {"training": {"compile": "layers", "batch_size": 3}})
    assert compilation.graphs()["compiled"] - before == 1


def test_a_corpus_of_less_than_a_batch_is_a_batch(run_tiny: Run, tmp_path: Path) -> None:
    """Where no batch would be whole none is left out."""
    changes: Tables = {"training": {"compile": "layers", "batch_size": 32, "max_steps": 2}}
    assert len(run_tiny(tmp_path / "run", changes)["curves"]["training"]) == 1


def test_layers_of_a_kind_share_a_graph(run_tiny: Run, tmp_path: Path) -> None:
    """Five layers of three kinds are three graphs."""
    mixers = ["gka", "attention", "gka", "gated_deltanet", "attention"]
    model = {"mixers": mixers, "head_dim": 8}
    tables = merged(LAYERS, {"model": model, "training": {"max_steps": 2}})
    shown = _run(run_tiny, tmp_path / "run", tables)["shown"]
    assert "3 graphs compiled" in shown


def _run(run_tiny: Run, output: Path, changes: Tables) -> dict[str, Any]:
    """`run_tiny`, whose number of layers follows from the mixers named."""
    return run_tiny(
        output, merged(changes, {"model": {"num_hidden_layers": len(changes["model"]["mixers"])}})
    )


def test_a_failure_is_an_error_that_names_the_option(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that fails ends the run; nothing runs uncompiled instead."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("no room for registers")

    compile = torch.compile
    monkeypatch.setattr(
        nn.Module, "compile",
        lambda m: setattr(m, "_compiled_call_impl", compile(m._call_impl, backend=fails)),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"compile is 'layers'.*no room.*--compile off"):
        run_tiny(tmp_path / "run", LAYERS)


def test_more_graphs_than_expected_are_an_error(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would go on uncompiled in silence after so many graphs of one function."""
    monkeypatch.setattr(compilation, "GRAPHS", 1)
    tables = merged(LAYERS, {"model": {"mixers": ["gka", "attention"], "head_dim": 8}})
    with pytest.raises(InputError, match=r"compile is 'layers', and torch\.compile failed: "):
        _run(run_tiny, tmp_path / "run", tables)


def test_two_compilers_are_refused(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's own (`torch_compile` of TrainingArguments sets the variable), or a compiled model."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with pytest.raises(InputError, match="ACCELERATE_DYNAMO_BACKEND is inductor"):
        run_tiny(tmp_path / "run", LAYERS)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    layer = nn.Linear(2, 2)
    layer.compile()
    wrapped: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    for module in (layer, wrapped):
        with (
            pytest.raises(InputError, match="is compiled already"),
            compilation.compiled([module], "model"),
        ):
            pass


def test_afterwards_nothing_is_compiled(tables: Tables) -> None:
    """In the block the layers are, and torch's settings differ; after it, also after an error, all is as
    before."""
    model = build_model(RunConfig.from_tables(tables), byte_tokenizer())
    layer: Any = model.model.layers[0]

    def limit() -> int:
        return torch._dynamo.config.recompile_limit

    before = limit()
    for error in (None, KeyError):
        try:
            with compilation.compiled([model], "layers"):
                assert layer._compiled_call_impl is not None and limit() != before
                if error is not None:
                    raise error
        except KeyError:
            pass
        assert layer._compiled_call_impl is None and limit() == before


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on a GPU that torch.compile has kernels for, nothing on a CPU; what is named is taken."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    for capability, expected in (((9, 0), "layers"), ((6, 1), "off")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert compilation.chosen("auto", gpu) == expected
    assert "an old GPU" in str(compilation.why_uncompiled(gpu))
    assert compilation.chosen("auto", cpu) == "off"
    assert [compilation.chosen(how, cpu) for how in ("layers", "model", "off")] == [
        "layers", "model", "off",
    ]  # fmt: skip


def test_an_unknown_value_is_refused() -> None:
    """By name, with the values there are."""
    with pytest.raises(
        InputError, match=r"training\.compile is 'block'; expected 'auto' or 'layers'"
    ):
        RunConfig.from_tables({"training": {"compile": "block"}})


def test_what_cuda_graphs_cannot_train_is_refused() -> None:
    """Another device, several passes a step, and priming, each with what to do instead."""
    with pytest.raises(InputError, match="needs an NVIDIA GPU; the device is cpu"):
        compilation.chosen("cuda-graphs", torch.device("cpu"))
    assert compilation.chosen("cuda-graphs", torch.device("cuda")) == "cuda-graphs"
    with pytest.raises(InputError, match=r"gradient_accumulation 2: .*larger"):
        compilation.check_graphs(2, alone=True)
    with pytest.raises(InputError, match="gka prime does not take; use 'layers'"):
        compilation.check_graphs(1, alone=False)


@pytest.mark.slow
def test_both_stages_of_priming_compile(run_prime: Any, tmp_path: Path) -> None:
    """Losses of matching and recovery are those of the uncompiled stages, with the end of the model matched
    and a teacher beside it."""
    found = []
    for how in ("off", "layers"):
        stage = {"compile": how, "max_steps": 2}
        changes = {"stage1": {**stage, "end_weight": 0.5}, "stage2": {**stage, "kl_weight": 0.5}}
        before = compilation.graphs()["compiled"]
        stages = run_prime(tmp_path / how, changes)["stages"]
        found.append(
            [row["loss"] for stage in stages.values() for row in stage["curves"]["training"]]
        )
        assert (compilation.graphs()["compiled"] > before) == (how != "off")
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_layers_are_found_inside_wrappers(tables: Tables) -> None:
    """Those of a model inside another module, as adapters wrap it; a module without any is refused."""
    model = build_model(RunConfig.from_tables(tables), byte_tokenizer())
    wrapped = nn.ModuleDict({"base": nn.ModuleDict({"model": model})})
    assert compilation.blocks_of(wrapped) == list(model.model.layers)
    with pytest.raises(InputError, match="Linear has no decoder layers; use 'model' or 'off'"):
        compilation.blocks_of(nn.Linear(2, 2))


PROCESS = """
import json, sys
import torch
from gka import chunk_gka
from gka.training import compilation

class Map(torch.nn.Module):
    steps = 4

    def forward(self, q, g):
        k, v = q.roll(1, 1), q.roll(2, 1)
        return chunk_gka(q, k, v, g, num_iter=self.steps)[0]

torch.manual_seed(0)
q = torch.nn.functional.normalize(torch.randn(1, 70, 2, 8), dim=-1).requires_grad_()
g = -0.1 * torch.rand(1, 70, 2)
module = Map()
found = []
for Map.steps in map(int, sys.argv[1:]):
    q.grad = None
    with compilation.compiled([module], "model"):
        module(q, g).square().sum().backward()
    found.append({"grad": q.grad.double().sum().item()} | compilation.graphs())
    torch._dynamo.reset()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_second_process_reads_the_graphs(tmp_path: Path) -> None:
    """Graphs with the op, forward and backward, come from the folder, with the same gradients; another number
    of solver steps, a constant inside the op's Function, is another graph with other gradients."""
    env = {**os.environ, "GKA_CACHE": str(tmp_path)}
    for name in ("GKA_COMPILE_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        env.pop(name, None)

    def run(*steps: int) -> list[dict[str, Any]]:
        said = subprocess.run(
            [sys.executable, "-c", PROCESS, *map(str, steps)],
            env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)

    (first,), (again, other) = run(4), run(4, 5)
    assert (first["compiled"], first["read"]) == (1, 0)
    assert (again["compiled"], again["read"]) == (0, 1) and again["grad"] == first["grad"]
    assert (other["compiled"], other["read"]) == (1, 1) and other["grad"] != first["grad"]
    assert (tmp_path / "compiled/graphs").is_dir()


def test_a_folder_that_cannot_be_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own folder is then taken, as it is with GKA_COMPILE_CACHE=0; one in the environment stays."""
    monkeypatch.setenv("GKA_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    seen = lambda: os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # noqa: E731
    with compilation._kept_graphs():
        assert seen() is None  # tests turn it off
    monkeypatch.delenv("GKA_COMPILE_CACHE")
    (tmp_path / "compiled").write_text("a file where the folder would be")
    with compilation._kept_graphs():
        assert seen() is None
    (tmp_path / "compiled").unlink()
    with compilation._kept_graphs():
        assert seen() == str(tmp_path / "compiled/graphs")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    with compilation._kept_graphs():
        assert seen() == "/mine"
