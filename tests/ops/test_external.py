"""Kernels of installed libraries: which may run a call and why not, and that they are asked rightly."""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gka.errors import InputError
from gka.ops import (
    available_external,
    chunk_simple_gla,
    external,
    external_call,
    last_backend,
    why_not_external,
)
from gka.ops.delta_rule import chunk_gated_delta_rule
from scripted_kernels import AMPERE, VERSIONS, draw, libraries
from tolerances import RELATIVE, assert_close

# a rounding of every output, and of every gradient, to 16 bits
TOLERANCE = RELATIVE[torch.bfloat16]
NEW = (0, 6, 0)


def call(rule: str, x: dict[str, Tensor], backend: str, **options: Any) -> Any:
    """One function for the three rules."""
    if rule == "simple_gla":
        return chunk_simple_gla(x["q"], x["k"], x["v"], x["g"], backend=backend, **options)
    g = None if rule == "delta_rule" else x["g"]
    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], g, x["beta"], backend=backend, **options)


def outcome(
    rule: str, inputs: dict[str, Tensor], backend: str, **options: Any
) -> dict[str, Tensor]:
    """o, the final states, and the gradients of all inputs and of the initial states."""
    x = {name: y.clone().requires_grad_() for name, y in inputs.items()}
    state = options.pop("initial_state", None)
    if state is not None:
        x["state"] = options["initial_state"] = state.clone().requires_grad_()
    o, final = call(rule, x, backend, output_final_state=True, **options)
    torch.manual_seed(1)
    weights = [torch.randn(y.shape).to(y.dtype) for y in (o, final)]
    leaves = list(x.values())
    grads = torch.autograd.grad((o, final), leaves, weights, allow_unused=True)
    assert o.dtype == inputs["q"].dtype and final.dtype == torch.float32
    named = {f"d{n}": y for n, y in zip(x, grads, strict=True) if y is not None}
    return {"o": o, "state": final, **named}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert_close(found[name], value, TOLERANCE, name)


PAIRS = [
    ("flash_qla", "gated_delta_rule"), ("flash_qla", "delta_rule"),
    ("fla", "gated_delta_rule"), ("fla", "delta_rule"), ("fla", "simple_gla"),
]  # fmt: skip


@pytest.mark.parametrize("name, rule", PAIRS)
def test_the_same_map(name, rule):
    """Scale, base of the decay, layout of the states and all gradients are those of the torch form."""
    inputs, state = draw(), torch.randn(1, 2, 128, 128)
    expected = outcome(rule, inputs, "torch", initial_state=state)
    with libraries():
        found = outcome(rule, inputs, name, initial_state=state)
        assert last_backend() == name
    assert_same(found, expected)


@pytest.mark.parametrize("name, rule", PAIRS)
def test_packed_sequences(name, rule):
    """Bounds of any integer type, an empty sequence among them, and one that holds all: each sequence has its
    own state, and an empty one ends as it began."""
    inputs, state = draw(), torch.randn(4, 2, 128, 128)
    bounds = torch.tensor([0, 3, 3, 68, 70], dtype=torch.int32)
    for options in ({}, {"initial_state": state}, {"cu_seqlens_cpu": bounds.clone()}):
        expected = outcome(rule, inputs, "torch", cu_seqlens=bounds, **options)
        with libraries():
            found = outcome(rule, inputs, name, cu_seqlens=bounds, **options)
        assert_same(found, expected)
        before = options.get("initial_state", torch.zeros_like(state))
        assert torch.equal(found["state"][1], before[1])


@pytest.mark.parametrize("name, rule", PAIRS)
def test_shared_heads_and_scales(name, rule):
    """Keys and values of fewer heads, their gradients summed over the heads that share; any scale, 0 too."""
    inputs = draw(heads=4, kv_heads=2)
    for scale in (0.5, -1.0, 0.0):
        expected = outcome(rule, inputs, "torch", scale=scale)
        with libraries():
            assert_same(outcome(rule, inputs, name, scale=scale), expected)


@pytest.mark.parametrize("name, rule", PAIRS)
def test_no_tokens(name, rule):
    """A call of no tokens gives none, and the states that it was given."""
    inputs = {n: x[:, :0] for n, x in draw().items()}
    state = torch.randn(1, 2, 128, 128)
    with libraries():
        o, final = call(rule, inputs, name, initial_state=state, output_final_state=True)
        assert o.shape == (1, 0, 2, 128) and final is not None and torch.equal(final, state)
        assert call(rule, inputs, name)[1] is None


@pytest.mark.parametrize("name, rule", PAIRS)
def test_wrong_bounds_are_refused(name, rule):
    """Bounds that fall or do not end at T never reach a library."""
    inputs = draw()
    with libraries(), pytest.raises(ValueError, match="end with T = 70"):
        call(rule, inputs, name, cu_seqlens=torch.tensor([0, 40]))


@pytest.mark.parametrize("name, rule", PAIRS)
def test_no_second_derivative(name, rule):
    """A second derivative is refused: the libraries' functions would leave a part out."""
    x = {n: y.requires_grad_() for n, y in draw().items()}
    with libraries():
        o, _ = call(rule, x, name)
        with pytest.raises(RuntimeError, match=r'no second derivative\. Use backend="torch"'):
            torch.autograd.grad(o.float().sum(), x["q"], create_graph=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "delta_rule"])
def test_flash_qla_is_one_operator_to_the_compiler(rule, packed):
    """A compiled graph of flash-qla has no break, and the results and gradients of the eager call."""
    inputs, state = draw(), torch.randn(2 if packed else 1, 2, 128, 128)
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 66, 70])} if packed else {}
    with libraries():
        expected = outcome(rule, inputs, "flash_qla", initial_state=state, **options)
        torch.compiler.reset()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(x, state, cu_seqlens):
            return call(
                rule, x, "flash_qla", initial_state=state, cu_seqlens=cu_seqlens,
                output_final_state=True,
            )  # fmt: skip

        x = {n: y.clone().requires_grad_() for n, y in inputs.items()}
        s = state.clone().requires_grad_()
        o, final = compiled(x, s, options.get("cu_seqlens"))
        torch.manual_seed(1)
        weights = [torch.randn(y.shape).to(y.dtype) for y in (o, final)]
        leaves = {**x, "state": s}
        grads = torch.autograd.grad((o, final), list(leaves.values()), weights, allow_unused=True)
        assert last_backend() == "flash_qla"
    named = {f"d{n}": y for n, y in zip(leaves, grads, strict=True) if y is not None}
    assert_same({"o": o, "state": final, **named}, expected)


def test_compiled_without_the_final_states():
    """Unasked, no states are returned, and the gradient is that of the output alone."""
    inputs = draw()
    op: Any
    with libraries():
        torch.compiler.reset()
        graph = torch.compile(chunk_gated_delta_rule, fullgraph=True, backend="aot_eager")
        grads = []
        for op in (chunk_gated_delta_rule, graph):
            x = {n: y.clone().requires_grad_() for n, y in inputs.items()}
            o, final = op(**x, backend="flash_qla")
            assert final is None
            grads.append(torch.autograd.grad(o.float().sum(), list(x.values())))
    for mine, theirs in zip(*grads, strict=True):
        assert_close(mine, theirs, TOLERANCE)


@pytest.mark.parametrize("bounds", [None, [0, 66, 70], [0, 66, 66, 70]])
def test_selective_checkpointing_runs_flash_qla_once(bounds: list[int] | None):
    """Kept, it runs once and its gradients are those without checkpointing, and a second derivative is
    refused; sequences without tokens are left to be run again."""
    contexts: Any = partial(create_selective_checkpoint_contexts, [torch.ops.gka.flash_qla.default])
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    leaves = {n: y.requires_grad_() for n, y in draw().items()}

    def outputs(*given: torch.Tensor) -> torch.Tensor:
        x = dict(zip(leaves, given, strict=True))
        return call("gated_delta_rule", x, "flash_qla", **options)[0].float()

    with libraries():
        expected = torch.autograd.grad(outputs(*leaves.values()).sum(), list(leaves.values()))
        module: Any = external_call.loaded("flash_qla")
        ran, run = [], module.chunk_gated_delta_rule_fwd
        module.chunk_gated_delta_rule_fwd = lambda **given: (ran.append(1), run(**given))[1]
        kept = [
            checkpoint(outputs, *leaves.values(), use_reentrant=False, context_fn=contexts).sum()
            for _ in range(2)
        ]
        found = torch.autograd.grad(kept[0], list(leaves.values()))
        assert len(ran) == (0 if bounds == [0, 66, 66, 70] else 2)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(kept[1], leaves["q"], create_graph=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, TOLERANCE)


def test_auto_takes_the_first_that_can():
    """ "auto" takes flash-qla, then flash-linear-attention, then torch, and says which."""
    inputs = draw(length=5)
    for versions, expected in (
        (VERSIONS, "flash_qla"),
        ({n: x for n, x in VERSIONS.items() if n != "flash-qla"}, "fla"),
        ({}, "torch"),
    ):
        with libraries(versions):
            call("gated_delta_rule", inputs, "auto")
            assert last_backend() == expected
            names = available_external("gated_delta_rule")
            assert (names or ["torch"])[0] == expected
    with libraries():
        call("simple_gla", inputs, "auto")
        assert last_backend() == "fla"
        narrow = draw(length=5, dim=64)
        call("gated_delta_rule", narrow, "auto")
        assert last_backend() == "fla"
        call("gated_delta_rule", {n: x.float() for n, x in inputs.items()}, "auto")
        assert last_backend() == "torch"


def test_off_a_gpu_auto_is_torch():
    """On this CPU no library is imported or chosen, whatever is installed."""
    call("gated_delta_rule", draw(length=5), "auto")
    assert last_backend() == "torch"
    reason = why_not_external("flash_qla", "gated_delta_rule", "cpu")
    assert reason == "its kernels need an NVIDIA GPU; got cpu."


@pytest.mark.parametrize(
    "name, rule, options, message",
    [
        ("flash_qla", "simple_gla", {}, "it has no simple_gla, only gated_delta_rule, delta_rule"),
        ("flash_qla", "delta_rule", {"dims": (64, 64)}, "heads of K = V = 128; got K = 64, V = 64"),
        (
            "flash_qla",
            "delta_rule",
            {"dtype": torch.float32},
            "bfloat16 and float16; got torch.float32",
        ),
        ("fla", "simple_gla", {"dims": (512, 64)}, "heads up to 256 wide; got K = 512"),
    ],
)
def test_reasons(name, rule, options, message):
    """Each limit of a library is told."""
    with libraries():
        assert message in (why_not_external(name, rule, **options) or "")


def test_chips_and_absence():
    """A chip that flash-qla has no kernels for, and a package that is not there, are told."""
    with libraries(chip=AMPERE):
        reason = why_not_external("flash_qla", "gated_delta_rule") or ""
        assert "compute capability 9.0, 10.0 and 10.3; this GPU has (8, 0)" in reason
        assert why_not_external("fla", "gated_delta_rule") is None
    with libraries({"triton": (3, 6, 0)}):
        for name, package in (("flash_qla", "flash-qla"), ("fla", "fla-core")):
            reason = why_not_external(name, "gated_delta_rule")
            assert reason == f"the package {package} is not installed."


def test_a_library_that_cannot_be_imported(monkeypatch):
    """An installed library whose import fails is refused with the error, and "auto" takes the next."""
    with libraries(), monkeypatch.context() as patched:
        patched.setitem(sys.modules, "flash_qla", None)
        reason = why_not_external("flash_qla", "gated_delta_rule") or ""
        assert reason.startswith("it cannot be imported: ModuleNotFoundError")
        assert available_external("gated_delta_rule") == ["fla"]


WRONG, RIGHT = True, False
# fla-core, triton, rule, K -> refused in training on Hopper; the sources are in gka/ops/external.py
GRADIENTS = [
    ((0, 4, 1), (3, 6, 0), "gated_delta_rule", 128, WRONG),
    ((0, 4, 1), (3, 6, 0), "gated_delta_rule", 32, RIGHT),
    ((0, 4, 1), (3, 6, 0), "simple_gla", 64, WRONG),
    ((0, 4, 1), (3, 3, 1), "gated_delta_rule", 128, RIGHT),
    ((0, 4, 1), (3, 7, 1), "gated_delta_rule", 128, RIGHT),
    ((0, 4, 2), (3, 6, 0), "gated_delta_rule", 128, RIGHT),
    ((0, 4, 2), (3, 6, 0), "gated_delta_rule", 64, WRONG),
    ((0, 5, 0), (3, 7, 1), "gated_delta_rule", 128, WRONG),
    ((0, 6, 0), (3, 6, 0), "gated_delta_rule", 128, WRONG),
    ((0, 6, 0), (3, 6, 0), "simple_gla", 128, WRONG),
    ((0, 6, 0), (3, 7, 1), "simple_gla", 64, RIGHT),
    ((0, 5, 1), (3, 7, 1), "delta_rule", 128, WRONG),
    ((0, 5, 2), (3, 6, 0), "delta_rule", 128, RIGHT),
    ((0, 4, 1), (3, 3, 1), "delta_rule", 128, RIGHT),
    # up to 0.5.1 it runs as the gated rule
    ((0, 4, 1), (3, 6, 0), "delta_rule", 128, WRONG),
    ((0, 4, 2), (3, 6, 0), "delta_rule", 128, RIGHT),
    ((0, 4, 2), (3, 6, 0), "delta_rule", 64, WRONG),
]


@pytest.mark.parametrize("fla, triton, rule, dim, wrong", GRADIENTS)
def test_versions_with_wrong_gradients(fla, triton, rule, dim, wrong):
    """On Hopper they are refused in training, with version and issue; without a gradient, and on other chips,
    they run."""
    versions = {"fla-core": fla, "triton": triton}
    with libraries(versions):
        reason = why_not_external("fla", rule, dims=(dim, dim))
        assert (reason is not None) == wrong
        if reason:
            assert ".".join(map(str, fla)) in reason and "issue" in reason
        assert why_not_external("fla", rule, dims=(dim, dim), training=False) is None
    with libraries(versions, chip=AMPERE):
        assert why_not_external("fla", rule, dims=(dim, dim)) is None


def test_tilelang_mends_the_gated_delta_rule():
    """From fla-core 0.5 on TileLang computes the gradient that Triton would get wrong."""
    versions = {"fla-core": NEW, "triton": (3, 6, 0), "tilelang": (0, 1, 15)}
    with libraries(versions):
        assert why_not_external("fla", "gated_delta_rule") is None
        assert "Install Triton 3.7.1." in (why_not_external("fla", "simple_gla") or "")


def test_a_wrong_version_is_never_picked():
    """By name it raises its reason, with "auto" torch runs; without gradients it may run."""
    inputs = draw(length=5)
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    with libraries({"fla-core": (0, 4, 1), "triton": (3, 6, 0)}):
        with pytest.raises(
            InputError, match=r"backend='fla' cannot run .* 0.4.1 gives wrong gradients"
        ):
            call("gated_delta_rule", leaves, "fla")
        call("gated_delta_rule", leaves, "auto")
        assert last_backend() == "torch"
        with torch.no_grad():
            call("gated_delta_rule", leaves, "auto")
        assert last_backend() == "fla"


def test_names():
    """Unknown names are refused with those there are."""
    inputs = draw(length=5)
    with pytest.raises(InputError, match=r"one of flash_qla, fla, auto, torch; got 'hopper'"):
        call("gated_delta_rule", inputs, "hopper")
    with pytest.raises(InputError, match="external kernels are flash_qla, fla; got 'cuda'"):
        why_not_external("cuda", "delta_rule")
    with pytest.raises(InputError, match="rule must be one of gated_delta_rule"):
        available_external("gla")  # pyright: ignore[reportArgumentType]
    with libraries():
        with pytest.raises(
            InputError, match=r"chunks of 64 tokens and no write gate; got chunk_size=32"
        ):
            call("simple_gla", inputs, "fla", chunk_size=32)
        with pytest.raises(InputError, match="it has no simple_gla"):
            call("simple_gla", inputs, "flash_qla")


def test_transforms_of_torch_func_stay_in_torch():
    """A library's function knows no torch.func: "auto" is torch inside, a name is refused."""
    inputs = draw(length=5)
    q = inputs.pop("q")
    with libraries():
        torch.func.grad(
            lambda q: call("gated_delta_rule", inputs | {"q": q}, "auto")[0].float().sum()
        )(q)
        assert last_backend() == "torch"
        with pytest.raises(InputError, match=r"no transform of torch\.func"):
            torch.func.grad(
                lambda q: call("delta_rule", inputs | {"q": q}, "fla")[0].float().sum()
            )(q)


def test_a_gpu_that_is_not_there_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked about a GPU where a torch with CUDA sees none, the libraries say so and nothing is raised."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    external._why_not.cache_clear()
    for name in external.EXTERNAL:
        assert "need an NVIDIA GPU" in (why_not_external(name, "delta_rule", "cuda") or "")
    external._why_not.cache_clear()
