"""Launch configurations: the stored tables, and the command that measures them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.op import tune_table

    return tune_table


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.op import tune

    return tune


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)], ids=str)
def test_every_kernel_has_a_configuration(capability, monkeypatch) -> None:
    """On every chip, for every kernel, operands and head width; float32 in a single stage."""
    from gka.kernels import configs
    from gka.kernels.triton.plan import SIZES

    monkeypatch.setattr(configs, "capability_of", lambda device: capability)
    for kernel in SIZES:
        for width in (16, 64, 96, 256):
            for exact in (False, True):
                options = configs.config(kernel, width, exact, torch.device("cpu"))
                assert options["num_warps"] in (4, 8)
                assert 1 <= options["num_stages"] <= (1 if exact else 3)
                assert set(options) <= {"num_warps", "num_stages", "maxnreg"}


def test_a_chip_of_its_own_table_uses_it(monkeypatch, tmp_path) -> None:
    """sm_89 reads the table of sm_86 until it has one of its own."""
    from gka.kernels import configs
    from gka.storage import write_text

    monkeypatch.setattr(configs, "CHIPS", tmp_path)
    for name in ("sm_86", "sm_90"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert configs.table_file((8, 9)).name == "sm_86.json"
    write_text(tmp_path / "sm_89.json", "{}")
    assert configs.table_file((8, 9)).name == "sm_89.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sm_86.json", "sm_89.json", "sm_90.json"]


def test_what_is_chosen(tables) -> None:
    """The fastest right candidate, where it is 2 % faster than the stored one."""
    held = tables.Candidate("solve", "16-bit", "128", {"num_warps": 4}, ms=1.0, stored=True)
    other = replace(held, options={"num_warps": 8}, stored=False)
    key = ("solve", "16-bit", "128")
    assert tables.chosen([held, replace(other, ms=0.99)])[key] is held
    faster, fastest = replace(other, ms=0.9), replace(other, ms=0.8)
    assert tables.chosen([faster, held, fastest])[key] is fastest
    assert tables.chosen([held, replace(other, ms=0.5, reason="wrong by 1")])[key] is held
    assert tables.chosen([other]) == {}  # nothing was timed


def test_a_table_is_changed_where_it_was_measured(tables) -> None:
    """One entry changes, with chip, date and versions beside; a new chip starts from the nearest."""
    from gka.kernels import configs

    text = configs.table_file((9, 0)).read_text()
    assert tables.dumps(json.loads(text)) == text
    held = tables.Candidate("solve", "16-bit", "128", {"num_warps": 4}, ms=1.0, stored=True)
    found = [held, replace(held, options={"num_warps": 8, "num_stages": 1}, ms=0.5, stored=False)]
    made = {"gpu": "a chip", "date": "2026-01-01"}
    table = json.loads(tables.dumps(tables.updated((8, 9), found, made)))
    assert table["chip"] == "sm_89"
    assert table["measured"] == [made | {"entries": ["solve 16-bit 128"]}]
    before = json.loads(configs.table_file((8, 6)).read_text())["launch"]
    assert table["launch"]["solve"]["16-bit"].pop("128") == {"num_warps": 8, "num_stages": 1}
    before["solve"]["16-bit"].pop("128")
    assert table["launch"] == before


def test_why_a_candidate_is_left_out(tune, tables) -> None:
    """Too much shared memory, too many spills, or the compiler's own words."""
    launches = [tune.Recorded("solve", None, {"num_warps": 4, "num_stages": 1}, (1,), ())]
    trial = tune.Trial(launches, "bfloat16", 128, (100, 2000))
    held, other = trial.candidates
    assert held.stored and other.options["num_warps"] == 8
    assert trial._judged(other, [(255, 0, 1000), (200, 50, 500)]).reason is None
    assert "shared memory" in trial._judged(other, [(255, 0, 3000)]).reason
    assert "spills 101" in trial._judged(other, [(255, 101, 10)]).reason

    def refuse():
        raise RuntimeError("no such layout\nmore")

    assert tune.tried(refuse, other).reason == "no such layout"


class Fake:
    """A launcher that fills its tensor, and what Triton tells of its kernel."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.compiled = SimpleNamespace(n_regs=100, n_spills=3, metadata=SimpleNamespace(shared=64))

    def __call__(self, grid, x: torch.Tensor) -> None:
        x.add_(self.value)


def test_a_candidate_with_other_results_is_left_out(tune, monkeypatch) -> None:
    """What a launch makes of the same inputs is compared with what the stored configuration made; a launch
    that works in place starts from its inputs again."""
    x = torch.ones(4)
    one = tune.Recorded(
        "solve", None, {"num_warps": 4, "num_stages": 1}, (1,), (x,), (x.clone(),), (x + 1.0,)
    )
    trial = tune.Trial([one, one], "float32", 64, (100, 2000))
    watch = tune.Stopwatch("cpu")
    for value, reason in ((1.0, None), (1.01, "wrong by 5.0e-03")):
        monkeypatch.setattr(trial, "launchers", lambda options, v=value: [Fake(v), Fake(v)])
        found = trial.measured(trial.candidates[1], watch, 3)
        assert found.reason == reason
        if reason is None:
            assert found.ms is not None and (found.registers, found.spills) == (100, 12)
            assert torch.equal(x, torch.ones(4))


def test_tuned_solvers_are_the_kernels_own(tune) -> None:
    """Solvers that the Triton backend does not have are not launched, whatever torch offers beside them."""
    from gka.ops import backends

    assert backends._BACKENDS["triton"].solvers == tune.SOLVERS


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels")
def test_recorded_launches_can_be_had_again(tune) -> None:
    """Each launch of both passes with either solver, alone and in any order, makes the same bits again."""
    tokens = tune.tokens_of(16, torch.float32, 1, 70, "cpu")
    for solver in ("chebyshev", "adaptive"):
        with tune.recording(run=True) as launches:
            tune.passes(tokens, solver)
        names = {one.name for one in launches}
        assert names == set(tune.SIZES) - ({"certify"} if solver == "chebyshev" else set())
        for one in reversed(launches):
            one.restore()
            tune.Launcher(one.kernel, one.options)(one.grid, *one.args)
            for x, value in zip(one.tensors, one.after, strict=True):
                assert torch.equal(x, value), one.name


def test_the_time_limit_ends_the_search(tune, monkeypatch, capsys) -> None:
    """With no time left nothing is tried, and that is said."""
    launches = [tune.Recorded("solve", None, {"num_warps": 4, "num_stages": 1}, (1,), ())]
    trial = tune.Trial(launches, "bfloat16", 64, (100, 2000))
    monkeypatch.setattr(tune, "trials", lambda *args: [trial])
    command = ["--compile-only", "--arch", "90", "--dims", "64", "--seconds", "0"]
    args = tune.parse([*command, "--dtypes", "bfloat16"])
    monkeypatch.setattr("gka.kernels.configs.capability_of", lambda device: (9, 0))
    assert tune.search(args, tune.Console()) == []
    assert "0 s are over" in capsys.readouterr().out


def test_candidates_are_compiled_without_a_gpu(tmp_path) -> None:
    """--compile-only lists what every candidate of a kernel takes, and stores no configuration."""
    tables = {p: p.read_text() for p in (ROOT / "src/gka/kernels/chips").iterdir()}
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "tune",
        "--dry-run",
        "--compile-only",
        "--arch",
        "90",
    ]
    command += ["--kernels", "readout", "--dims", "64", "--dtypes", "bfloat16", "float32"]
    command += ["--output", str(tmp_path / "tune.json")]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    told = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found = json.loads((tmp_path / "tune.json").read_text())["candidates"]
    assert [(c["operands"], c["options"]["num_warps"]) for c in found] == [
        ("16-bit", 4), ("16-bit", 8), ("float32", 4), ("float32", 8),
    ]  # fmt: skip
    assert all(c["registers"] > 16 and c["shared"] > 0 and c["ms"] is None for c in found)
    assert {p: p.read_text() for p in tables} == tables
