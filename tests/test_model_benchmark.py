"""The benchmark of whole models' training steps on a CPU: what it measures, records and refuses."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from pictures import assert_drawn
from scripted_kernels import VERSIONS, libraries

ROOT = Path(__file__).parents[1]


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.model import training

    return training


@pytest.fixture
def run(training, monkeypatch, tmp_path):
    """The command with these arguments; its model.json."""

    def call(*arguments: str) -> dict:
        words = ["--device", "cpu", "--sizes", "tiny", "--output", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", ["model", *words])
        training.main()
        return json.loads((tmp_path / "model.json").read_text())

    return call


def cell(training, mixer: str, **changes):
    options = {"compiled": "off", "checkpoint": "none", "steps": 2, "warm_up": 1, "device": "cpu"}
    return training.Cell("tiny", mixer, **(options | changes))


def figures(training, mixer: str, **changes) -> dict:
    return training.step.measure(cell(training, mixer, **changes))


def test_a_cell_in_a_process_of_its_own(run, tmp_path):
    """Times of every step on device and host, the first step, device time and its kernels by group, tokens a
    second, what ran and on what; in JSON, tables and a picture."""
    result = run(
        "--mixers", "gla", "--compile", "off", "--steps", "2", "--warm-up", "1", "--profile"
    )  # fmt: skip
    found = result["cells"]["tiny/gla/off/auto"]
    assert found["status"] == "ok" and found["backend"] == "torch"
    assert len(found["step_ms"]) == len(found["host_ms"]) == 2
    assert found["first_step_s"] > 0 and found["device_ms"] > 0 and found["kernels"]
    assert found["tokens_per_s"] == pytest.approx(1e3 * 128 / (sum(found["step_ms"]) / 2))
    assert found["made"]["card"] == "CPU" and found["made"]["versions"]["torch"]
    page = (tmp_path / "model.md").read_text()
    assert "| tiny | gla | torch | off | none | " in page and "MFU: model FLOPs" in page
    assert sum(x["share"] for x in found["groups"]) == pytest.approx(1)
    profile = (tmp_path / "model-profile.md").read_text()
    assert "## tiny/gla/off/auto" in profile and "| gka::backward | " in profile
    assert_drawn(tmp_path / "model.png")
    assert not (tmp_path / "cell.json").exists()


@pytest.mark.parametrize(
    "mixer", ["gka", "gka-adaptive", "gka-8", "gka-cg", "gated_deltanet", "attention"]
)
def test_every_mixer_trains(training, mixer):
    """Each is built as its name says; those of one solver and the others take finite steps."""
    if mixer not in ("gka-adaptive", "gka-8"):
        found = figures(training, mixer)
        assert found["status"] == "ok", found
    model = training.step.build(cell(training, mixer), training.SIZES["tiny"])
    first = model.model.layers[0].mixer
    wanted = {
        "gka": ("chebyshev", 30), "gka-8": ("chebyshev", 8), "gka-adaptive": ("adaptive", 30),
        "gka-cg": ("cg", 30),
    }  # fmt: skip
    if mixer in wanted:
        assert (first.solver, first.num_iter) == wanted[mixer]


def test_checkpointing_recomputes_every_layer(training):
    """A checkpointed cell's layers run once more in the backward pass."""
    for checkpoint, expected in (("none", 1), ("selective", 2), ("full", 2)):
        chosen = cell(training, "gla", checkpoint=checkpoint)
        size = training.SIZES["tiny"]
        model = training.step.build(chosen, size)
        calls = []
        model.model.layers[0].mixer.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        training.step.make_step(chosen, size, model)()
        assert len(calls) == expected


def ok(training, ms: float, **more) -> dict:
    size = training.SIZES["tiny"]
    return {
        "status": "ok", "parameters": 10**6, "tokens": size.tokens, "backend": None,
        "first_step_s": 1.0, "step_ms": [ms], "host_ms": [1.0], "device_ms": ms, "launches": 1,
        "kernels": [], "peak_bytes": 2**30, "loss": 1.0, "checkpoint": "none", "groups": [],
        "tokens_per_s": 1e3 * size.tokens / ms, "tflops_6n": 98.94, "tflops": None,
        "made": {"card": "H100", "peak_tflops": 989.4, "versions": {}, "commit": "c"}, **more,
    }  # fmt: skip


def test_cells_are_measured_once(run, training, monkeypatch, tmp_path):
    """Started again, cells that ran are known, others are tried again, eager ones join compiled ones, each
    has its ratio to its own kind, and the ledger holds each as soon as it is measured."""
    seen = []

    def measure(cell, folder, limit):
        stored = tmp_path / "model.json"
        before = json.loads(stored.read_text())["cells"] if stored.exists() else {}
        assert all(f"tiny/{mixer}/{compiled}/auto" in before for mixer, compiled in seen[:1])
        seen.append((cell.mixer, cell.compiled))
        if cell.mixer == "gla" and len(seen) == 2:
            return {"status": "failed", "message": "a fault"}
        return ok(training, 10.0 if cell.mixer == "gated_deltanet" else 20.0)

    monkeypatch.setattr(training, "measure", measure)
    mixers = ("--mixers", "gated_deltanet,gla")
    run(*mixers)
    assert "- tiny/gla/layers/auto: failed: a fault" in (tmp_path / "model.md").read_text()
    run(*mixers)
    result = run(*mixers, "--compile", "off")
    assert seen == [
        ("gated_deltanet", "layers"), ("gla", "layers"), ("gla", "layers"),
        ("gated_deltanet", "off"), ("gla", "off"),
    ]  # fmt: skip
    assert len(result["cells"]) == 4
    page = (tmp_path / "model.md").read_text()
    row = next(x for x in page.splitlines() if x.startswith("| tiny | gla |  | layers"))
    assert "| 10.0% |" in row and row.endswith("| 2.00 |  |")


def test_other_settings_need_another_folder(run, training, monkeypatch):
    """Cells of other numbers of steps are not mixed."""
    monkeypatch.setattr(training, "measure", lambda *_: ok(training, 1.0))
    run("--mixers", "gla")
    with pytest.raises(SystemExit, match="figures of other settings"):
        run("--mixers", "gla", "--steps", "3")


def test_the_budget(run, training, monkeypatch):
    """Once it is spent no further cell is begun; those are listed and tried at the next start."""
    monkeypatch.setattr(training, "measure", lambda *_: ok(training, 1.0))
    told = run("--mixers", "gla", "--budget", "0")["cells"]["tiny/gla/layers/auto"]
    assert told["status"] == "not run" and "budget of 0 s was spent" in told["message"]
    assert run("--mixers", "gla")["cells"]["tiny/gla/layers/auto"]["status"] == "ok"


def test_a_cell_without_enough_memory_is_checkpointed(training, monkeypatch, tmp_path):
    """Asked for "auto", it runs again with more and more recomputed, and says so; asked for one way, it
    does not."""
    asked = []

    def in_process(cell, folder, limit):
        asked.append(cell.checkpoint)
        return {"status": "oom"} if cell.checkpoint in ("none", "selective") else {"status": "ok"}

    monkeypatch.setattr(training, "in_process", in_process)
    found = training.measure(cell(training, "gla", checkpoint="auto"), tmp_path, 1.0)
    assert asked == ["none", "selective", "full"]
    assert found == {"status": "ok", "out_of_memory": ["none", "selective"]}
    assert training.measure(cell(training, "gla"), tmp_path, 1.0) == {"status": "oom"}


def test_a_process_that_dies_or_hangs_is_told(training, monkeypatch, tmp_path):
    """The last line of its errors, or the time that it had."""
    monkeypatch.setattr(training.json, "dumps", lambda _: "no cell")
    found = training.in_process(cell(training, "gla"), tmp_path, 120.0)
    assert found["status"] == "failed" and "ended with 1: " in found["message"]
    found = training.in_process(cell(training, "gla"), tmp_path, 0.01)
    assert found == {"status": "failed", "message": "not done after 0 s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "huge"], "there are tiny, 28m, 395m"),
        (["--mixers", "mamba"], "there are gka, gka-adaptive.*got 'mamba'"),
        (["--steps", "0"], "a number from 1 on; got '0'"),
        (["--compile", "yes"], "there are off, layers, model, cuda-graphs; got 'yes'"),
        (["--compile", "cuda-graphs"], "needs a GPU; got --device cpu"),
        (["--checkpoint", "some"], "there are auto, none, full"),
        (["--device", "cuda"], "no GPU that torch can use"),
    ],
)
def test_wrong_options_are_refused_by_name(training, arguments, message, capsys, monkeypatch):
    """Options that make no sense end the command with status 2, before anything runs."""
    import re

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        training.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_baselines_are_not_measured_in_plain_torch(training, monkeypatch):
    """On a GPU a delta rule without kernels is not run, with every library's reason."""
    size = training.SIZES["tiny"]
    chosen = cell(training, "gated_deltanet", device="cuda")
    with libraries({"triton": (3, 6, 0)}), pytest.raises(training.step.NotAvailable) as refusal:
        training.step.build(chosen, size)
    for package in ("flash-qla", "fla-core"):
        assert f"the package {package} is not installed." in str(refusal.value)
    with libraries(VERSIONS):
        training.step.refuse_plain_torch(chosen, size)


def test_solvers_without_kernels_are_not_measured(training):
    """On a GPU a mixer that only plain torch could run is not run, with every backend's reason."""
    chosen = cell(training, "gka-cg", device="cuda")
    with pytest.raises(training.step.NotAvailable, match=r"hopper: .*triton: "):
        training.step.build(chosen, training.SIZES["tiny"])


@pytest.mark.parametrize("compiled", ["layers", "model"])
def test_ways_of_compiling(training, compiled, monkeypatch):
    """A step of layers compiled one by one, or of the whole model, has the eager step's loss."""
    torch.compiler.reset()
    size, whole = training.SIZES["tiny"], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode=None, **x: whole(f, backend="aot_eager", **x)
    )
    losses = []
    for way in ("off", compiled):
        chosen = cell(training, "gka-8", compiled=way, checkpoint="selective")
        model = training.step.build(chosen, size)
        losses.append(training.step.make_step(chosen, size, model)().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_groups_of_kernels(training):
    """Ours by name, torch's by what they do, the longest group first."""
    from benchmarks.model.kernel_groups import REST, group_of, grouped
    from benchmarks.op.profile import Kernel

    adam = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdam"
    groups = {
        "gka_forward": "gka_forward", "solve_kernel": "solve_kernel",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_NNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "void cutlass::Kernel2<cutlass_80_tensorop>": "matrix products",
        "triton_poi_fused_add_mul_3": "compiled, fused", "triton_tem_fused_mm_1": "matrix products",
        adam: "optimizer", "Memcpy DtoD (Device -> Device)": "copies and fills",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>": "copies and fills",
        "void at::native::reduce_kernel<512, 1>": "other kernels of torch",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "chunk_gated_delta_rule_fwd_kernel_h": REST,
    }  # fmt: skip
    assert {name: group_of(name) for name in groups} == groups
    rows = grouped(
        [Kernel("gka_scan", 10.0, 2), Kernel("nvjet_a", 20.0, 1), Kernel("nvjet_b", 30.0, 4)]
    )
    assert rows == [
        {"group": "matrix products", "ms": 0.05, "share": 50 / 60, "launches": 5},
        {"group": "gka_scan", "ms": 0.01, "share": 10 / 60, "launches": 2},
    ]  # fmt: skip


class TheirLayer(nn.Module):
    def __init__(
        self, hidden_size: int, head_dim: int, num_heads: int, mode: str, expand_v: float = 2
    ):
        super().__init__()
        self.given = (hidden_size, head_dim, num_heads, mode, expand_v)
        self.map = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor):
        return self.map(x), None, None


class Refusing(nn.Module):
    def __init__(self, hidden_size: int):
        raise RuntimeError("this GPU is not supported")


def test_layers_of_flash_linear_attention(training, monkeypatch):
    """They stand in the decoder with our sizes as far as they have them; one that the installed version lacks
    or that refuses is "not run", with the reason."""
    package, module = ModuleType("fla"), ModuleType("fla.layers")
    vars(module).update(KimiDeltaAttention=TheirLayer, MesaNet=Refusing)
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.layers", module)
    found = figures(training, "fla:kda")
    assert found["status"] == "ok" and found["tflops"] is None and found["tflops_6n"] > 0
    model = training.step.build(cell(training, "fla:kda"), training.SIZES["tiny"])
    assert all(x.mixer.layer.given == (64, 32, 2, "chunk", 1.0) for x in model.model.layers)
    missing, refused = figures(training, "fla:mamba3"), figures(training, "fla:mesa_net")
    assert missing["status"] == refused["status"] == "not run"
    assert "has no layer Mamba3" in missing["message"]
    assert "this GPU is not supported" in refused["message"]
    with pytest.raises(ValueError, match="for speed alone"):
        model.model.layers[0].mixer(torch.zeros(1, 3, 64), attention_mask=torch.ones(1, 3))


def test_model_flops(training):
    """6 N a token; attention adds 6 T D a head and layer, GKA 30 steps in either pass and the rest."""
    from benchmarks.model.sizes import SIZES, mixer_flops, model_flops

    size = SIZES["395m"]
    matrices, whole = model_flops("attention", size, 10**6)
    assert matrices == 6e6 * size.tokens and whole is not None
    assert whole - matrices == 6 * 2048 * 128 * 8 * 24 * size.tokens
    steps = 2 * 30 * (2 * 128**2 + 4 * 64 * 128)
    assert mixer_flops("gka", size) == steps + 3 * (8 * 128**2 + 6 * 64 * 128)
    assert (
        mixer_flops("gka-adaptive", size) is mixer_flops("gka-cg", size) is None
        and mixer_flops("fla:kda", size) is None
    )
