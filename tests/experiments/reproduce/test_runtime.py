"""The runtime experiment: who is timed, who is refused with which reason, and how ratios are judged."""

import itertools

import pytest
import torch

from gka.errors import NotAvailable
from gka.experiments import fla_mixers
from gka.experiments.reproduce import runtime
from gka.experiments.reproduce.runtime_layers import (
    BEST,
    GKA,
    MAIN,
    PEERS,
    Contender,
    Shape,
    forward_backward,
    layer,
)

SHAPE = Shape(batch=1, length=64, heads=1, dim=16)
SIZE = runtime.Size(1, 1, 16, (64,), None, 0.001)


def test_the_main_contenders_run_and_peers_say_why_not() -> None:
    """On a CPU all main ones have times, finite gradients and a backend; a peer has a reason instead."""
    found = runtime.measure(SIZE, 64, [*MAIN, PEERS[0], PEERS[-1]], "cpu")
    rows = {row["contender"]: row for row in found["rows"]}
    for contender in MAIN:
        row = rows[contender.name]
        assert len(row["ms"]) == 5 and min(row["ms"]) > 0 and row["finite"], contender.name
    assert rows[GKA]["backend"] == "torch" and "scaled_dot" in rows["attention"]["backend"]
    assert "need a GPU" in rows["fla:gated_deltanet"]["refused"]
    assert "NVIDIA GPU" in rows["gated_deltanet, fla"]["refused"]
    page = runtime.table([found])
    assert "| gka, cg |" in page and "- gated_deltanet, fla: refused:" in page
    assert "say nothing of the layers' kernels" in page


def test_solvers_and_steps_are_those_of_the_name() -> None:
    """Each of ours is the layer with that option."""
    for name, key, value in (
        ("gka, cg", "solver", "cg"), ("gka, adaptive", "solver", "adaptive"),
        ("gka, 8 steps", "num_iter", 8), (GKA, "num_iter", 30),
    ):  # fmt: skip
        contender = next(c for c in MAIN if c.name == name)
        assert getattr(layer(contender, SHAPE, "cpu", torch.float32), key) == value


def test_a_call_is_forward_and_backward_of_everything() -> None:
    """Gradients of the input and of every parameter, in every call."""
    mixer = layer(MAIN[0], SHAPE, "cpu", torch.float32)
    call = forward_backward(mixer, SHAPE, "cpu", torch.float32)
    first, second = call(), call()
    assert len(first) == 1 + len(list(mixer.parameters())) and first[0].shape == (1, 64, 16)
    assert all(bool(x.any()) and torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_delta_rule_without_kernels_is_no_contender_on_a_gpu() -> None:
    """Instead of timing plain torch: the reasons of all libraries (asked for a card that is not here)."""
    contender = next(c for c in MAIN if c.name == BEST)
    if torch.cuda.is_available():
        pytest.skip("there may be kernels here")
    with pytest.raises(NotAvailable, match=r"flash_qla: .*; fla: "):
        layer(contender, SHAPE, "cuda", torch.bfloat16)


def test_mamba_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention's layer would run a plain loop, which is no comparison."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotAvailable, match="mamba-ssm, which is not installed"):
        layer(Contender("m", "fla:mamba2"), SHAPE, "cuda", torch.bfloat16)


def test_a_layer_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have their times."""

    def fails(*args: object) -> object:
        raise RuntimeError("no such instruction\nmore")

    kept = runtime.forward_backward
    turns = itertools.count()
    monkeypatch.setattr(
        runtime, "forward_backward", lambda *a: fails() if next(turns) == 0 else kept(*a)
    )
    found = runtime.measure(SIZE, 64, MAIN[-2:], "cpu")
    first, second = found["rows"]
    assert first["failed"] == "no such instruction" and "ms" in second
    assert "- deltanet: failed: no such instruction" in runtime.table([found])


def cell(length: int, **times: float) -> dict:
    rows = [
        {"contender": name.replace("fla_", "fla:"), "ms": [ms] * 5, "note": ""}
        for name, ms in times.items()
    ]
    return {"length": length, "tokens": length, "dtype": "bfloat16", "rows": rows}


def test_statements_take_the_worst_length() -> None:
    """Comparable at every length, or not; linear by the longest length and a quarter of it."""
    results = [
        cell(1024, gka=2.0, gated_deltanet=1.0),
        cell(8192, gka=12.0, gated_deltanet=10.0, attention=20.0),
        cell(32768, gka=48.0, gated_deltanet=40.0, attention=200.0),
        cell(8192, gka=12.0, gated_deltanet=10.0, fla_mesa_net=30.0),
    ]
    found = {check.text: check for check in runtime.checks(results)}
    by = [(check.found, check.passed) for check in found.values()]
    assert by[:4] == [("2", False), ("not measured", None), ("0.24", True), ("1", True)]
    assert by[4:6] == [("1.2", False), ("1.2", True)] and by[-1] == ("2.5", True)
    on_cpu = [one | {"dtype": "float32"} for one in results]
    assert all(check.passed is None for check in runtime.checks(on_cpu))


def test_peers_have_cells_of_their_own() -> None:
    """One for each length, then one for each peer beside GKA and Gated DeltaNet."""
    size = runtime.RUNTIME.sizes["full"]
    keys = [c.key for c in runtime.cells(size, runtime.Options(device="cpu"))]
    assert keys[:2] == ["T 8192", "T 2048"] and len(keys) == len(size.lengths) + len(PEERS)
    assert "T 8192, fla:mesa_net" in keys
    assert all(p.mixer in fla_mixers.LAYERS for p in PEERS if p.mixer.startswith("fla:"))
