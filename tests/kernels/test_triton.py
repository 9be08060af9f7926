"""The Triton kernels compute the chunk-wise map and its derivative (interpreted without a GPU)."""

import itertools
from dataclasses import replace

import pytest
import torch

from gka.ops import chunk_gka, end_state, fused_recurrent_gka, why_unavailable
from interpreted import DEVICE, problem, results
from problems import make_problem
from quick import quick_first
from tolerances import RELATIVE, assert_close

pytest.importorskip("triton", reason="the kernels need the package triton")

CASES = {
    "tied": {},
    "separate decays, grouped heads, odd sizes": {
        "tied": False,
        "heads": (4, 2, 1),
        "dims": (20, 40),
    },
    "no gates": {"gates": False, "heads": (2, 1, 2)},
    "packed, one sequence empty": {"bounds": [0, 0, 1, 20]},
    "no ridge": {"num_iter": 0},
    "wide heads, their states in quarters": {"heads": (1, 1, 1), "dims": (200, 132)},
}


@pytest.mark.parametrize("name", CASES)
def test_float32_kernels_equal_the_float64_torch_form(name: str) -> None:
    """In float32 every output, state and gradient is within 1e-5 of the float64 result."""
    case = dict(CASES[name])
    if DEVICE == "cuda" and max(case.get("dims", (0,))) > 128:
        pytest.skip("float32 heads this wide fit no chip")
    num_iter, bounds = case.pop("num_iter", 5), case.get("bounds")
    inputs = problem(**case)
    options: dict = {"num_iter": num_iter}
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    expected = results(inputs, "torch", torch.float64, "cpu", cu_seqlens=cu_seqlens, **options)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(DEVICE)
    actual = results(inputs, "triton", torch.float32, DEVICE, cu_seqlens=cu_seqlens, **options)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 1e-5, f"{name}: {key}")


SEGMENTED = {
    "batch, the last segment and chunk ragged": {"batch": 2, "length": 90},
    "packed, empty sequences between": {"bounds": [0, 0, 70, 70, 75, 120], "length": 120},
}


@pytest.mark.parametrize("name", SEGMENTED)
def test_scans_in_segments_equal_the_float64_torch_form(name: str, monkeypatch) -> None:
    """Where sequences are cut into segments of two chunks, forwards and backwards."""
    monkeypatch.setattr("gka.kernels.tables.SHORTEST_SEGMENT", 2)
    case = SEGMENTED[name]
    bounds = case.get("bounds")
    inputs = problem(**case)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    expected = results(inputs, "torch", torch.float64, "cpu", cu_seqlens=cu_seqlens, num_iter=5)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(DEVICE)
    actual = results(inputs, "triton", torch.float32, DEVICE, cu_seqlens=cu_seqlens, num_iter=5)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 1e-5, f"{name}: {key}")


def test_groups_of_heads_add_up_to_the_float64_torch_form(monkeypatch) -> None:
    """Where the derivative works on 2 of 8 heads at a time, pairs of them sharing a key head."""
    monkeypatch.setattr("gka.kernels.backward.CHUNK_HEADS", 4)
    inputs = problem(heads=(8, 4, 8))
    expected = results(inputs, "torch", torch.float64, "cpu", num_iter=3)
    actual = results(inputs, "triton", torch.float32, DEVICE, num_iter=3)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 1e-5, key)


def test_float16_operands_keep_the_accuracy_of_their_inputs() -> None:
    """With 16-bit inputs and operands, whose sizes do not matter, errors stay near those of bfloat16."""
    inputs = problem()
    inputs["v"] = inputs["v"] * 30.0
    expected = results(inputs, "torch", torch.float64, "cpu", num_iter=5)
    actual = results(inputs, "triton", torch.float16, DEVICE, num_iter=5)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 2e-2, key)


@pytest.mark.parametrize(
    ("dtype", "solver"),
    quick_first(
        itertools.product((torch.float32, torch.bfloat16), ("chebyshev", "adaptive", "cg")),
        {(torch.float32, "chebyshev"), (torch.bfloat16, "adaptive"), (torch.bfloat16, "cg")},
    ),
)
def test_keys_of_any_size_beside_each_other(dtype: torch.dtype, solver: str) -> None:
    """A key of norm 1e3 that has faded leaves later keys of norm 0.1 as they are: W k^2 / F of the small
    keys is at most 1, and no operand is scaled by the large one."""
    inputs = problem(tied=False)
    inputs["k"][:, 6] *= 1e3
    inputs["k"][:, 9:] *= 0.1
    for name in ("g", "gk"):
        inputs[name][:, 8] = -30.0
    inputs = {name: x.to(dtype).double() if name in "qkv" else x for name, x in inputs.items()}
    options = {"ridge_ratio": 0.1, "num_iter": 60, "solver": solver}
    expected = results(inputs, "torch", torch.float64, "cpu", **options)
    actual = results(inputs, "triton", dtype, DEVICE, **options)
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 2e-2}[dtype]
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, tolerance, key)
    assert_close(actual["o"][:, 9:].cpu(), expected["o"][:, 9:], tolerance, "o of the small keys")


@pytest.mark.parametrize(
    ("faded", "solver"),
    quick_first(
        itertools.product((-24.0, -28.0, -31.0), ("chebyshev", "adaptive", "cg")),
        {(-24.0, "chebyshev"), (-28.0, "cg"), (-31.0, "adaptive")},
    ),
)
def test_a_faded_h_under_a_full_u(faded: float, solver: str) -> None:
    """With F_t near the empty history's threshold p_t/F_t ~ F_t^-3 is beyond float32, gradients are not."""
    inputs = problem(tied=False)
    inputs["g"] *= 0.0
    inputs["gk"][:, 7] = faded
    inputs["beta"][:, 5:12] = 0.0
    inputs["beta"][:, 12:] = 1.0
    inputs["v"], inputs["u0"] = 1e-6 * inputs["v"], 1e-6 * inputs["u0"]
    options = {"ridge_ratio": 0.3, "num_iter": 90, "solver": solver}
    expected = results(inputs, "torch", torch.float64, "cpu", **options)
    actual = results(inputs, "triton", torch.float32, DEVICE, **options)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 1e-4, key)


def test_what_it_cannot_run_is_refused_with_the_reason() -> None:
    """float64 and odd chunk sizes raise, naming what to use instead."""
    assert "float64" in (why_unavailable("triton", DEVICE, torch.float64) or "")
    q = torch.randn(1, 8, 1, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="chunk_size = 24"):
        chunk_gka(q, q, q, backend="triton", chunk_size=24)


def test_heads_too_wide_for_a_chip_are_refused(monkeypatch) -> None:
    """float32 tiles of 256 columns outgrow every chip's shared memory: the error says what fits."""
    monkeypatch.setattr("gka.kernels.configs.widest", lambda exact, device: 128)
    q = torch.randn(1, 8, 1, 160, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"up to 128 wide.*K = 160"):
        chunk_gka(q, q, q, backend="triton")


@pytest.mark.parametrize(
    ("capability", "hip", "reason"), [((7, 5), None, "compute capability"), ((9, 0), "6.4", "AMD")]
)
def test_other_gpus_are_refused(monkeypatch, capability, hip, reason) -> None:
    """Chips without bfloat16 products, and AMD's, which torch calls "cuda" too, are left to plain torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gka.kernels.configs.capability_of", lambda device: capability)
    monkeypatch.setattr("torch.version.hip", hip)
    assert reason in (why_unavailable("triton", "cuda", torch.bfloat16) or "")
    assert why_unavailable("torch", "cuda", torch.bfloat16) is None


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("given", [True, False], ids=["alpha", "no alpha"])
def test_a_solution_much_smaller_than_its_query_keeps_its_digits(op, given: bool) -> None:
    """Few large keys: the mix has no difference of x and q, whose rounding would be all of U^T z."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 1, 8, generator=generator).double() for _ in range(3))
    k, alpha = 100.0 * k, torch.ones(1, 6, 1).double() if given else None

    def run(dtype: torch.dtype, device: str, backend: str) -> torch.Tensor:
        inputs = [None if x is None else x.to(device, dtype) for x in (q, k, v, None, None, alpha)]
        return op(*inputs, backend=backend)[0].cpu()

    expected = run(torch.float64, "cpu", "torch")
    assert_close(run(torch.float32, DEVICE, "triton"), expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scans_alone_give_end_states_and_chunk_starts(dtype: torch.dtype) -> None:
    """`end_state(backend="triton", return_starts=True)` in float32, and for 16-bit inputs to float16's
    precision: the end states, and what the scan stores for the chunks, unscaled."""
    p = make_problem(40, (2, 1, 2), (16, 80), decay="separate")
    narrow = p.map(lambda x: x.to(DEVICE, dtype if x.dim() == 4 and len(x) == 1 else torch.float32))
    narrow = replace(narrow, h0=None, u0=None)
    exact = narrow.map(lambda x: x.cpu().double())
    expected, found = (
        end_state(x.k, x.v, x.g, x.gk, x.beta, return_starts=True, chunk_size=16, backend=backend)
        for x, backend in ((exact, "torch"), (narrow, "triton"))
    )
    assert expected.starts is not None and found.starts is not None
    tolerance = RELATIVE[torch.float32] if dtype == torch.float32 else 1e-3
    pairs = zip((*found[1:3], *found.starts), (*expected[1:3], *expected.starts), strict=True)
    for x, y in pairs:
        assert_close(x.cpu(), y, tolerance)
