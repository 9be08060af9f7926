"""The GPU's benchmark, tried out on a CPU at small sizes: what it records, writes and says."""

import json
import re
import sys
import weakref
from pathlib import Path

import pytest

from pictures import assert_drawn

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--sizes", "1x32x1", "--dims", "16", "--seconds", "0.001"]
SMALL = ["--device", "cpu", "--sizes", "1x96x2,2x32x1", "--dims", "16", "--seconds", "0.01"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.op import bench

    return bench


@pytest.fixture
def run(gpu, monkeypatch, tmp_path):
    """The command with these arguments; its op.json."""

    def call(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["op", "--output", str(tmp_path), *arguments])
        gpu.main()
        return json.loads((tmp_path / "op.json").read_text())

    return call


def contender(gpu, name: str, leaves, call):
    return gpu.registry.Contender(name, leaves, lambda: call)


def test_what_is_written(run, tmp_path, capsys):
    """Every repeat of both passes of op, peer and layer, on what it was measured, table, plot."""
    result = run(*SMALL, "--peers", "sdpa", "--layer-size", "32x2x16x64")
    assert [g["size"] for g in result["groups"]] == ["1 x 96 x 2, D = 16", "2 x 32 x 1, D = 16"]
    for group in [*result["groups"], result["layer"]]:
        ran = {n: e for n, e in group["contenders"].items() if e["status"] == "ok"}
        assert ran
        for entry in ran.values():
            for which in ("forward", "forward+backward"):
                times = entry[which]
                repeats = [x for part in times["ms"] for x in part]
                assert len(times["ms"]) == 5
                assert times["min"] == min(repeats) <= times["median"] <= max(repeats)
    assert {"chunk_gka, chebyshev", "sdpa"} <= result["groups"][0]["contenders"].keys()
    assert "GatedKalmaNet, chebyshev" in result["layer"]["contenders"]
    assert result["versions"]["torch"] and result["backend"] == "torch"
    assert str(tmp_path) not in result["command"] and "--sizes 1x96x2,2x32x1" in result["command"]
    text = (tmp_path / "op.md").read_text()
    assert "| 2 x 32 x 1, D = 16 | sdpa |" in text
    assert_drawn(tmp_path / "op.png")
    assert "1 x 96 x 2, D = 16" in capsys.readouterr().out


def test_what_is_profiled(run, gpu, monkeypatch, tmp_path):
    """Kernels of one training step of the op, of each solver's layer and of a layer whose modules stay
    torch's, after the timings: by kernel and in all, in profile.txt, op.json and a table."""
    monkeypatch.setattr(gpu.profile, "WARM_UP", 1)
    monkeypatch.setattr(gpu.profile, "CALLS", 1)
    result = run(*TINY, "--peers", "none", "--layer-size", "32x2x16x32", "--profile")
    assert list(result)[-3:-1] == ["op_profile", "layer_profile"]
    layers = result["layer_profile"]["contenders"]
    plain = "GatedKalmaNet, chebyshev, torch's modules around the op"
    ours = [f"GatedKalmaNet, {solver}" for solver in ("chebyshev", "adaptive", "cg")]
    assert list(layers) == [*ours, plain]
    text, page = ((tmp_path / name).read_text() for name in ("profile.txt", "op.md"))
    for name, entry in (layers | result["op_profile"]["contenders"]).items():
        assert f"one forward + backward of {name}, " in text
        us, launches = ([k[key] for k in entry["kernels"]] for key in ("us", "launches"))
        assert entry["kernels_ms"] == pytest.approx(sum(us) / 1e3)
        assert us == sorted(us, reverse=True) and entry["launches"] == sum(launches) > 10
    assert "aten::mm" in text
    assert f"| {plain} | {layers[plain]['kernels_ms']:.2f} | " in page


def test_a_layer_of_torchs_modules_calls_them(gpu, monkeypatch):
    """The layer measured beside the fused kernels runs none of them where they could run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    size = gpu.LayerSize(32, 2, 16, 64)
    layers = [gpu.registry.our_layer(size, "chebyshev", "triton", fused) for fused in (True, False)]
    reasons = [layer.why_unfused("cpu", gpu.torch.bfloat16) for layer in layers]
    assert reasons[0] is None and reasons[1]


def test_a_profile_that_fails_leaves_the_rest(run, gpu, monkeypatch, tmp_path):
    """Timings stay, and what could not be profiled is listed with its reason, beside what is known of it."""
    profile = gpu.profile
    whole, calls = profile.kernels, []

    def kernels(call, watch):
        calls.append(call)
        if len(calls) == 2:
            raise RuntimeError("CUPTI is missing")
        return whole(call, watch)

    monkeypatch.setattr(profile, "kernels", kernels)
    monkeypatch.setattr(profile, "WARM_UP", 1)
    monkeypatch.setattr(profile, "CALLS", 1)
    options = ("--peers", "none", "--layer-size", "32x2x16x32", "--profile")
    result = run(*TINY, *options)
    layers = result["layer_profile"]["contenders"]
    failed = layers["GatedKalmaNet, chebyshev"]
    assert failed["status"] == "failed" and "kernels" not in failed and failed["first_call_s"]
    assert layers["GatedKalmaNet, adaptive"]["kernels"]
    assert "forward" in result["layer"]["contenders"]["GatedKalmaNet, chebyshev"]
    text, page = ((tmp_path / name).read_text() for name in ("profile.txt", "op.md"))
    assert "failed: RuntimeError: CUPTI is missing" in text and "aten::" in text
    size = "kernels of hidden 32, 2 heads of 16, 1 x 32"
    assert f"- GatedKalmaNet, chebyshev failed: RuntimeError: CUPTI is missing ({size})" in page


def test_kept_memory_is_that_of_what_a_call_returns(gpu, monkeypatch):
    """The result of the call is alive when memory is read again."""
    from gka.experiments.stopwatch import Stopwatch

    watch = Stopwatch("cpu")
    assert watch.kept_bytes(object) is None
    held: list = []
    monkeypatch.setattr(watch, "cuda", True)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        gpu.torch.cuda, "memory_allocated", lambda: 100 + sum(r() is not None for r in held)
    )

    def call():
        x = gpu.torch.zeros(1)
        held.append(weakref.ref(x))
        return x

    assert watch.kept_bytes(call) == 1
    assert gpu.torch.cuda.memory_allocated() == 100


def test_a_failure_is_recorded_and_the_rest_goes_on(run, gpu, monkeypatch, tmp_path):
    """A peer that raises, in its import or in its backward pass, is listed with its message; ratios to the
    baseline are formed in its absence from nothing else."""

    def broken(x):
        raise OSError("no such kernel")

    def missing():
        raise ImportError("not installed")

    peers = {
        "gated_delta_rule": contender(gpu, "gated_delta_rule", ("q",), lambda x: x.q * x.do),
        "simple_gla": contender(gpu, "simple_gla", ("q",), broken),
        "mesa_net": gpu.registry.Contender("mesa_net", ("q",), missing),
        "sdpa": contender(gpu, "sdpa", ("q", "beta"), lambda x: x.q * 2),  # beta has no gradient
    }
    monkeypatch.setattr(gpu.registry, "PEERS", peers)
    result = run(*SMALL, "--no-layer")
    first, _, later, _ = result["groups"]
    assert first["contenders"]["gated_delta_rule"]["status"] == "ok"
    failed = first["contenders"]["simple_gla"]
    assert failed == {"status": "failed", "message": "OSError: no such kernel"}
    assert first["contenders"]["sdpa"]["status"] == "failed"
    assert "not installed" in later["contenders"]["mesa_net"]["message"]
    assert later["repeated"] and later["contenders"]["gated_delta_rule"]["status"] == "ok"
    text = (tmp_path / "op.md").read_text()
    assert text.count("| gated_delta_rule |") == 2
    assert "- simple_gla failed: OSError: no such kernel (1 x 96 x 2, D = 16; 2 x 32" in text


def test_solvers_that_the_backend_lacks_are_not_run(run, gpu, monkeypatch):
    """Conjugate gradients are measured where the backend has them, and listed with its reason elsewhere."""
    small = ["--device", "cpu", "--sizes", "1x32x1", "--dims", "16", "--seconds", "0.01"]
    options = [*small, "--peers", "none", "--no-layer"]
    (group,) = run(*options)["groups"]
    assert group["contenders"]["chunk_gka, cg"]["status"] == "ok"
    monkeypatch.setattr(
        gpu.registry, "why_unavailable", lambda *call: "no cg." if "cg" in call else None
    )
    (group,) = run(*options)["groups"]
    refused = {"status": "not run", "message": "no cg."}
    assert group["contenders"]["chunk_gka, cg"] == refused


def test_the_time_limit(run):
    """Nothing is begun after the limit, and what was not run says so."""
    result = run(*SMALL, "--no-layer", "--limit-seconds", "0")
    for group in result["groups"]:
        for entry in group["contenders"].values():
            assert entry == {"status": "not run", "message": "the limit of 0 s was reached"}


def test_the_page_is_updated_between_its_markers(run, tmp_path):
    """--update replaces what stands between the markers and nothing else, again and again, from a stored run
    too; a page without markers is refused."""
    run(*SMALL, "--peers", "none", "--no-layer")
    page = tmp_path / "page.md"
    begin, end = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        run("--from", str(tmp_path / "op.json"), "--update", str(page))
        text = page.read_text()
        assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n")
        assert "old" not in text and text.count("| chunk_gka, chebyshev |") == 2
    page.write_text("no markers")
    with pytest.raises(ValueError, match="gpu results: begin"):
        run("--from", str(tmp_path / "op.json"), "--update", str(page))
    assert page.read_text() == "no markers"


def test_the_documentation_has_the_markers(gpu):
    """docs/performance.md can be updated."""
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.index(gpu.report.BEGIN) < text.index(gpu.report.END)


def test_work_is_counted_as_documented(gpu):
    """65.5 kFLOP a step and 2.15 MFLOP in all for a token and head at D = 128."""
    assert gpu.registry.step_flops(128) == 65_536
    assert gpu.registry.forward_flops(gpu.Size(1, 1, 1, 128)) == 30 * 65_536 + 180_224


def entry(median: float) -> dict:
    times = {
        "ms": [[median]] * 5, "median": median, "min": median, "max": median, "host_ms": 2.0,
    }  # fmt: skip
    return {"status": "ok", "forward": times, "forward+backward": times}


def test_ratios_growth_and_the_star(gpu):
    """A ratio is that of the rounds; 131072 tokens against 16 x 8192; a star marks a host that is slower."""
    report = gpu.report
    ratio = {"ms": [[2.0, 4.0, 90.0], [6.0]]}, {"ms": [[2.0], [2.0]]}
    assert report.ratio(*ratio) == "2.50 (2.00-3.00)"
    shapes = [(8192, 1.0), (131072, 20.0)]
    groups = [
        {
            "size": str(t), "shape": {"batch": 1, "length": t, "heads": 16, "dim": 64},
            "contenders": {"ours": entry(ms)},
        }
        for t, ms in shapes
    ]  # fmt: skip
    lines = list(report.growth({"groups": groups}))
    assert lines[0] == "ours, D = 64, forward: 131072 tokens take 1.25 times 16 x 8192 tokens"
    assert report.span(entry(1.0)["forward"]).startswith("1.000* ")
    assert report.span(entry(3.0)["forward"]).startswith("3.000 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "8192x16", "--device", "cpu"], "sizes are BxTxH"),
        (["--dims", "many", "--device", "cpu"], "dims are numbers"),
        (
            ["--peers", "mamba", "--device", "cpu"],
            "there are flash_qla, gated_delta_rule.*got 'mamba'",
        ),
        (["--device", "cuda"], "no GPU that torch can use"),
    ],
)
def test_wrong_options_are_refused_by_name(run, arguments, message, capsys, monkeypatch):
    """Options that make no sense end the command with status 2, before anything runs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_speed_of_the_loop(gpu) -> None:
    """Twenty more steps that take 200 us, 1e9 operations each: 10 us a step, 100 TFLOP/s."""
    from benchmarks.op import profile as profiled

    few, many = (
        [profiled.Kernel("copy", 900.0, 1), profiled.Kernel("gka_forward", us, 1)]
        for us in (50.0, 250.0)
    )
    told = profiled.loop_speed(few, many, 1e9, 20, 200.0)
    assert told == "the solve's loop: 10.00 us a step, 100 TFLOP/s, 50% of the card's peak"
    with pytest.raises(ValueError, match="no kernel of the solve"):
        profiled.loop_speed(few[:1], many, 1e9, 20, None)


def test_ratios_are_to_flash_qla_where_it_was_measured(run, gpu, monkeypatch, tmp_path):
    """Ratios are to flash-qla at sizes that it takes, to flash-linear-attention's op at others; what is timed
    although its gradient is wrong on this chip is listed with the reason."""
    peers = {
        name: contender(gpu, name, ("q",), lambda x: x.q * x.do)
        for name in ("flash_qla", "gated_delta_rule", "sdpa")
    }
    monkeypatch.setattr(gpu.registry, "PEERS", peers)
    reasons = {("flash_qla", 16): "its kernels take heads of 32.", ("fla", 32): "issue 640."}

    def why_not(name, rule, device, dims, training):
        reason = reasons.get((name, dims[0]))
        return None if name == "fla" and not training else reason

    monkeypatch.setattr(gpu.registry, "why_not_external", why_not)
    for name, library in (("flash_qla", "flash_qla"), ("gated_delta_rule", "fla")):
        peers[name] = gpu.registry.Contender(
            name, ("q",), lambda: lambda x: x.q * x.do, library=(library, "gated_delta_rule")
        )
    small = ["--device", "cpu", "--sizes", "1x32x1", "--dims", "16,32", "--seconds", "0.01"]
    result = run(*small, "--no-layer")
    assert [gpu.report.baseline(g) for g in result["groups"]] == ["gated_delta_rule", "flash_qla"]
    text = (tmp_path / "op.md").read_text()
    assert re.search(r"D = 16 \| gated_delta_rule \| [^|]+\| 1\.00 \(1\.00-1\.00\)", text)
    assert re.search(r"D = 32 \| flash_qla \| [^|]+\| 1\.00 \(1\.00-1\.00\)", text)
    assert "- flash_qla not run: its kernels take heads of 32. (1 x 32 x 1, D = 16)" in text
    known = "gated_delta_rule is timed, but not to be trained with here: issue 640."
    assert f"- {known} (1 x 32 x 1, D = 32)" in text
