"""Conjugate gradients in the Triton kernels (interpreted without a GPU)."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.maths.chunked import Settings, Tokens
from gka.maths.solvers import SolverName
from gka.maths.solvers.cg import most_steps
from gka.maths.solvers.chebyshev import chebyshev_error
from gka.ops import chunk_gka, solver_steps
from interpreted import DEVICE, problem, results
from quick import quick_first
from tolerances import RELATIVE, assert_close

pytest.importorskip("triton", reason="the kernels need the package triton")
from gka.kernels.call import GpuCall
from gka.kernels.triton.passes import TRITON

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
RATIO = 0.02
EXACT: dict[str, Any] = {"num_iter": 120}  # Chebyshev steps: in float64 the exact solution

CASES: dict[str, dict[str, Any]] = {
    "tied": {"length": 40},
    "separate decays, grouped heads, odd sizes": {
        "heads": (4, 2, 1), "dims": (20, 40), "tied": False, "length": 35,
    },
    "no gates": {"gates": False, "heads": (2, 1, 2)},
    "packed, one sequence empty": {"bounds": [0, 0, 1, 40], "length": 40},
    "wide heads, their states in quarters": {"heads": (1, 1, 1), "dims": (200, 132)},
}  # fmt: skip


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Heads as the kernels get them, in float64."""
    return {name: x.to(dtype).double() if name in "qkv" else x for name, x in inputs.items()}


def check(inputs: dict[str, Tensor], dtype: torch.dtype, num_iter: int, what: str, **options: Any):
    """Every output, state and gradient is within the dtype's tolerance of the exact solution's."""
    inputs, bounds = rounded(inputs, dtype), options.pop("bounds", None)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    expected = results(
        inputs, "torch", torch.float64, "cpu", cu_seqlens=cu_seqlens, **EXACT, **options
    )
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(DEVICE)
    options |= {"num_iter": num_iter, "solver": "cg", "cu_seqlens": cu_seqlens}
    actual = results(inputs, "triton", dtype, DEVICE, **options)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, RELATIVE[dtype], f"{what}: {key}")


@pytest.mark.parametrize("name", CASES)
def test_float32_kernels_find_the_exact_solution(name: str) -> None:
    """With the bound of 60 steps every output, state and gradient is the exact solution's in float32."""
    case = CASES[name]
    if DEVICE == "cuda" and max(case.get("dims", (0,))) > 128:
        pytest.skip("float32 heads this wide fit no chip")
    check(problem(**case), F32, 60, name, bounds=case.get("bounds"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    quick_first(
        itertools.product(("tied", "separate decays, grouped heads, odd sizes"), (F16, BF16)),
        {("tied", F16), ("separate decays, grouped heads, odd sizes", BF16)},
    ),
    ids=str,
)
def test_16_bit_operands_keep_the_accuracy_of_their_inputs(name: str, dtype: torch.dtype) -> None:
    """With 16-bit inputs and float16 products every result is within the dtype's tolerance."""
    check(problem(**CASES[name]), dtype, 30, name)


def test_a_ridge_below_float16s_rounding_ends_and_is_finite() -> None:
    """A step along a direction whose curvature is rounding has any length, and float16 products overflow: the
    row ends before. So x stays below |q| over the least curvature that is told apart."""
    inputs = problem(heads=(1, 1, 1), dims=(64, 16), length=64)
    settings: dict[str, Any] = {"ridge_ratio": 1e-6, "num_iter": 60, "solver": "cg"}
    found = results(inputs, "triton", F16, DEVICE, **settings)
    assert all(x.isfinite().all() for x in found.values())
    assert found["o"].abs().max() < 1e4


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e4])
def test_any_ridge(ratio: float) -> None:
    """A weak ridge, which takes many steps, costs no accuracy, nor does one beside which H vanishes."""
    inputs = rounded(problem(), F32)
    exact: dict[str, Any] = {"ridge_ratio": ratio, "num_iter": 600 if ratio < 0.01 else 60}
    expected = results(inputs, "torch", torch.float64, "cpu", **exact)
    options = {"ridge_ratio": ratio, "num_iter": 400 if ratio < 0.01 else 30, "solver": "cg"}
    actual = results(inputs, "triton", F32, DEVICE, **options)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 2e-4 if ratio < 0.01 else RELATIVE[F32], key)


@pytest.mark.parametrize("decay", [0.0, -0.01, -1.0, -30.0])
def test_steps_are_those_of_the_torch_form(decay: float) -> None:
    """In float32 no chunk takes more than two steps more or fewer than torch's, which are counted without
    the adjoint solve: from none, for an empty history, to fewer than the bound's."""
    inputs = problem(length=70, tied=False, heads=(4, 2, 2))
    inputs["k"][:, :16] = 0.0
    x = {name: value.float() for name, value in inputs.items()}
    gk = torch.full_like(x["gk"], decay)

    def steps(backend: str, device: str) -> Tensor:
        given = {"gk": gk, "beta": x["beta"], "q": x["q"]}
        given = {name: value.to(device) for name, value in given.items()}
        return solver_steps(
            x["k"].to(device), **given, solver="cg", chunk_size=16, backend=backend
        ).cpu()  # fmt: skip

    found, wanted = steps("triton", DEVICE), steps("torch", "cpu")
    assert (found - wanted).abs().max() <= 2
    assert (found[:, :16] == 0).all() and (found[:, 16:] >= 2).all()
    assert found.max() < 30 < most_steps(RATIO, 30)


def test_error_is_within_the_bound_of_plain_steps() -> None:
    """The A-norm error of every x_t, against Cholesky in float64, is within 1/T_{r+1}(1 + 2a)."""
    inputs = problem(heads=(1, 1, 1), length=50)
    eye = torch.eye(16).double()[None, None]
    given = {name: value.float().to(DEVICE) for name, value in inputs.items()}
    x = chunk_gka(
        given["q"], given["k"], torch.zeros_like(given["v"]), gk=given["g"], beta=given["beta"],
        initial_state=(given["h0"], eye.float().to(DEVICE)),
        scale=1.0, num_iter=12, chunk_size=16, solver="cg", backend="triton",
    )[0].cpu().double()  # fmt: skip
    target, h, worst = chebyshev_error(RATIO, 12), inputs["h0"][0, 0], 0.0
    for t in range(50):
        k = inputs["k"][0, t, 0] * inputs["beta"][0, t, 0]
        h = inputs["g"][0, t, 0].exp() * h + torch.outer(k, k)
        matrix = h + RATIO * h.norm() * eye[0, 0]
        exact = torch.linalg.solve(matrix, inputs["q"][0, t, 0])
        error = x[0, t, 0] - exact
        worst = max(worst, ((error @ matrix @ error) / (exact @ matrix @ exact)).sqrt().item())
    assert 0.01 * target < worst <= target  # it stops where it may


@pytest.mark.parametrize("other", [0.0, torch.nan])
def test_a_token_does_not_depend_on_other_queries(other: float) -> None:
    """Other queries that are 0, with which its chunk ends with it, or NaN leave a token's output as it is to
    rounding: a row that is done stands still, whatever its chunk goes on to do."""
    inputs = problem(heads=(1, 1, 1), length=16, gates=False)
    given = {n: x.to(DEVICE, F32) for n, x in inputs.items()}
    initial = (given.pop("h0"), given.pop("u0"))
    given["q"][:, 9] = given["k"][:, 9]  # solved in fewer steps than others

    def output(q: Tensor) -> tuple[Tensor, int]:
        changed: dict[str, Any] = given | {"q": q}
        o, _ = chunk_gka(
            **changed, initial_state=initial, solver="cg", backend="triton", chunk_size=16
        )
        steps = solver_steps(
            given["k"], initial_state=initial[0], solver="cg", q=q, chunk_size=16, backend="triton"
        )
        return o.cpu(), int(steps.max())

    (o, most), counts = output(given["q"]), set()
    for t in (2, 9, 15):
        alone = torch.full_like(given["q"], other)
        alone[:, t] = given["q"][:, t]
        found, steps = output(alone)
        counts.add(steps)
        assert_close(found[:, t], o[:, t], 2e-6)  # the readout's operands have one scale a chunk
        rest = found[:, torch.arange(16) != t]
        assert rest.isnan().all() if other != 0.0 else (rest == 0.0).all()
    assert min(counts) < most  # some row was done before its chunk


def test_a_query_that_is_no_number_takes_one_step() -> None:
    """A NaN query, its chunk's only one, ends the iteration at its first step; queries of 0 take none."""
    inputs = problem(heads=(1, 1, 1), length=32)
    q = torch.zeros_like(inputs["q"])
    q[:, 20, :, 3] = torch.nan
    steps = solver_steps(
        inputs["k"].to(DEVICE, F32), initial_state=inputs["h0"].to(DEVICE, F32), solver="cg",
        q=q.to(DEVICE, F32), chunk_size=16, backend="triton",
    )  # fmt: skip
    assert steps[0, ::16, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    quick_first(
        itertools.product(("k", "beta", "g"), (torch.nan, torch.inf)),
        {("k", torch.nan), ("beta", torch.inf), ("g", torch.nan)},
    ),
)
def test_nonfinite_numbers_end_and_are_not_hidden(name: str, value: float) -> None:
    """A key, write gate or decay that is no number ends the iteration: earlier chunks and other heads keep
    their bits, and the tokens from it on are not finite."""
    inputs = problem(length=40)
    given = {n: x.to(DEVICE, F32) for n, x in inputs.items()}
    initial = (given.pop("h0"), given.pop("u0"))

    def output(**changed: Tensor) -> Tensor:
        t: dict[str, Any] = given | changed
        o, _ = chunk_gka(
            **t, gk=t["g"], initial_state=initial, solver="cg", backend="triton", chunk_size=16
        )
        return o.cpu()

    bad = given[name].clone()
    bad[0, 20, 1] = value
    o, found = output(), output(**{name: bad})
    assert torch.equal(found[:, :, 0], o[:, :, 0])
    assert torch.equal(found[:, :16], o[:, :16])
    assert not found[:, 20:, 1].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_an_empty_history_is_solved_to_zero(dtype: torch.dtype) -> None:
    """Zero keys, no states: no steps, x = 0, and every gradient finite; one step for a key on its own."""
    inputs = problem(length=40)
    inputs["k"][:, :20] = 0.0
    inputs["h0"], inputs["u0"] = inputs["h0"] * 0.0, inputs["u0"] * 0.0
    actual = results(inputs, "triton", dtype, DEVICE, solver="cg")
    assert (actual["o"][:, :20] == 0).all()
    assert all(bool(x.isfinite().all()) for x in actual.values())


@pytest.mark.parametrize("size", [2.0**-80, 2.0**-30, 2.0**30])
def test_the_size_of_queries_does_not_matter(size: float) -> None:
    """bfloat16 queries times a power of two give that multiple of the output, bit for bit: float16 products
    see right-hand sides of one size."""
    given = {n: x.to(DEVICE, BF16 if n in "qkv" else F32) for n, x in problem(length=40).items()}
    initial = (given.pop("h0"), given.pop("u0"))

    def output(factor: float) -> Tensor:
        scaled: dict[str, Any] = given | {"q": given["q"] * factor}
        return chunk_gka(
            **scaled, initial_state=initial, solver="cg", backend="triton", chunk_size=16
        )[0]

    assert torch.equal(output(size), output(1.0) * size)


def test_groups_of_heads_add_up(monkeypatch) -> None:
    """Where the derivative works on 2 of 8 heads at a time, pairs of them sharing a key head."""
    monkeypatch.setattr("gka.kernels.backward.CHUNK_HEADS", 4)
    check(problem(heads=(8, 4, 8)), F32, 60, "groups")


def test_a_ridge_below_the_roundoff_ends() -> None:
    """A system that float16 products cannot tell from a singular one takes some steps for each of its
    dimensions, far from the limit, and stays finite."""
    ratio, inputs = 1e-9, problem(length=32)
    x = {n: x.to(DEVICE, F16 if n in "qkv" else F32) for n, x in inputs.items()}
    steps = solver_steps(
        x["k"], x["g"], ratio, initial_state=x["h0"], beta=x["beta"], solver="cg", q=x["q"],
        chunk_size=16, backend="triton",
    )  # fmt: skip
    assert 0 < steps.max() < 60 < most_steps(ratio, 30)
    found = results(inputs, "triton", F16, DEVICE, ridge_ratio=ratio, solver="cg")
    assert all(bool(x.isfinite().all()) for x in found.values())


def test_kernels_compiled_for_plain_steps_are_not_taken() -> None:
    """A call whose limit is 39 steps and one of 39 plain steps have kernels of their own."""
    q = torch.randn(1, 16, 1, 16, device=DEVICE)
    tokens = Tokens(q, q, q, None, None, None, None, None, None, None)

    def signature(solver: SolverName, num_iter: int) -> tuple:
        settings = Settings(1.0, RATIO, num_iter, 16, True, False, solver)
        return GpuCall(TRITON, tokens, settings).signature

    assert most_steps(RATIO, 30) == 39
    assert signature("cg", 30) != signature("chebyshev", 39)
    assert signature("cg", 30) == signature("cg", 30) != signature("cg", 40)
