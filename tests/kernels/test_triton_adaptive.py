"""The adaptive solver of the Triton kernels (interpreted without a GPU)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.ops import chunk_gka, solver_steps
from interpreted import DEVICE, problem, results
from tolerances import RELATIVE, assert_close

pytest.importorskip("triton", reason="the kernels need the package triton")
RATIO, STEPS = 0.02, 12
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}

CASES: dict[str, dict[str, Any]] = {
    "tied": {"heads": (2, 2, 2), "dims": (16, 16)},
    "separate decays, grouped heads, odd sizes": {
        "heads": (4, 2, 1), "dims": (20, 40), "tied": False,
    },
    "packed, one sequence empty": {"bounds": [0, 0, 18, 60], "length": 60},
    "wide heads, their states in quarters": {"heads": (1, 1, 1), "dims": (200, 132)},
}  # fmt: skip


def leaning(**case: Any) -> dict[str, Tensor]:
    """`problem` with keys that lean the same way and slow decays, whose first chunks still run plain."""
    inputs = problem(**{"length": 50, **case})
    torch.manual_seed(1)
    inputs["k"] = normalize(silu(torch.randn_like(inputs["k"]) + 1.0), dim=-1)
    for name in {"g", "gk"} & inputs.keys():
        inputs[name] = 0.01 * inputs[name]
    return inputs


@pytest.fixture
def certificates(monkeypatch: pytest.MonkeyPatch) -> list:
    """Certificates of all solves from here on, in their order."""
    from gka.kernels.triton import passes

    found, certify = [], passes._certify

    def keep(call, heads, h, made):
        launch = certify(call, heads, h, made)

        def kernel(grid, *arguments) -> None:
            launch.kernel(grid, *arguments)
            found.append(type(made)(*(x.clone().cpu() for x in made)))

        return launch._replace(kernel=kernel)

    monkeypatch.setattr(passes, "_certify", keep)
    return found


def expected_steps(inputs: dict[str, Tensor], bounds: list[int] | None) -> Tensor:
    """n of every chunk [M,H] as the torch form in float32 has it."""
    x = {name: value.float() for name, value in inputs.items()}
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    steps = solver_steps(
        x["k"], x.get("gk", x["g"]), RATIO, STEPS, x["h0"], cu_seqlens, beta=x["beta"],
        num_heads=x["q"].shape[2], chunk_size=16,
    )  # fmt: skip
    length = steps.shape[1]
    ends = [0, length] if bounds is None else bounds
    firsts = [t for a, b in pairwise(ends) for t in range(a, b, 16)]
    return steps[0, firsts]


def told_steps(inputs: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """n of every chunk [M,H] as `solver_steps` has it from the kernels."""
    x = {name: value.float().to(DEVICE) for name, value in inputs.items()}
    steps = solver_steps(
        x["k"], x.get("gk", x["g"]), RATIO, STEPS, x["h0"], cu_seqlens, beta=x["beta"],
        num_heads=x["q"].shape[2], chunk_size=16, value_dim=x["v"].shape[3], backend="triton",
    )  # fmt: skip
    length = steps.shape[1]
    ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return steps[0, [t for a, b in pairwise(ends) for t in range(a, b, 16)]].cpu()


@pytest.mark.parametrize("name", CASES)
def test_results_and_steps_are_those_of_the_torch_form(name: str, certificates: list) -> None:
    """In float32 every chunk takes the torch form's steps in both passes, and every output, state and
    gradient is that form's in the same precision, whose roundoff is in the certificate."""
    case = CASES[name]
    if DEVICE == "cuda" and max(case.get("dims", (0,))) > 128:
        pytest.skip("float32 heads this wide fit no chip")
    inputs, bounds = leaning(**case), case.get("bounds")
    options: dict[str, Any] = {"num_iter": STEPS, "solver": "adaptive"}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds)
    expected = results(inputs, "torch", torch.float32, "cpu", **options)
    if bounds is not None:
        options["cu_seqlens"] = options["cu_seqlens"].to(DEVICE)
    actual = results(inputs, "triton", torch.float32, DEVICE, **options)
    forward, backward = certificates
    steps = expected_steps(inputs, bounds)
    assert torch.equal(told_steps(inputs, options.get("cu_seqlens")), steps)
    assert torch.equal(forward.steps.long(), steps)
    assert torch.equal(backward.steps, forward.steps)
    if max(case.get("dims", (0,))) < 100:
        assert steps.unique().numel() > 2  # chunks of several counts, so both kinds of solve
        assert (steps == STEPS).any()
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, RELATIVE[torch.float32], f"{name}: {key}")


def test_groups_of_heads_solve_as_the_forward_pass_did(certificates, monkeypatch) -> None:
    """Where the derivative works on 2 of 4 heads at a time its certificates are the forward pass's, bit for
    bit: sequences are cut as they were there."""
    monkeypatch.setattr("gka.kernels.backward.CHUNK_HEADS", 4)
    monkeypatch.setattr("gka.kernels.tables.SHORTEST_SEGMENT", 1)
    monkeypatch.setattr("gka.kernels.tables.SCAN_PROGRAMS", 8)  # 2 segments for 4 heads, 4 for 2
    inputs = leaning(heads=(4, 2, 4), length=60)
    expected = results(inputs, "torch", torch.float64, "cpu", num_iter=4, solver="adaptive")
    actual = results(inputs, "triton", torch.float32, DEVICE, num_iter=4, solver="adaptive")
    forward, *groups = certificates
    assert len(groups) == 2
    for name in ("phi", "steps", "tau"):
        parts = torch.cat([getattr(c, name) for c in groups], -1)
        assert torch.equal(parts, getattr(forward, name)), name
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 1e-5, key)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_certificate_holds(dtype: torch.dtype, certificates: list) -> None:
    """Float64 eigenvalues of the system of the inputs as given: those of P^-1 A lie in [1, 1 + phi/a] at
    every token of a chunk that runs with N_t, but for the operands' rounding."""
    inputs = leaning(heads=(1, 1, 1))
    inputs["k"] = inputs["k"].to(dtype).double()
    results(inputs, "triton", dtype, DEVICE, num_iter=STEPS, solver="adaptive")
    found = certificates[0]
    a, checked = RATIO, 0
    for t, h in enumerate(states(inputs)):
        chunk = t // 16
        if found.steps[chunk, 0] == STEPS:
            continue
        w, tau = found.w[0, t, 0].double(), found.tau[0, t, 0].double()
        inverse = torch.eye(16).double() - tau * torch.outer(w, w)  # of P/lambda
        root = torch.linalg.cholesky(inverse)
        spectrum = torch.linalg.eigvalsh(root.mT @ (h / (a * h.norm()) + torch.eye(16)) @ root)
        rounding = 16 * 16 * ROUNDOFF[dtype] if dtype == torch.float32 else 4 * ROUNDOFF[dtype]
        assert spectrum[0] >= 1.0 - rounding / a
        assert spectrum[-1] <= 1.0 + found.phi[chunk, 0].double() / a
        checked += 1
    assert checked > 16


def states(inputs: dict[str, Tensor]) -> list[Tensor]:
    """H_t of the only head, float64."""
    h, made = inputs["h0"][0, 0], []
    for t in range(inputs["k"].shape[1]):
        k = inputs["k"][0, t, 0] * inputs["beta"][0, t, 0]
        h = inputs["g"][0, t, 0].exp() * h + torch.outer(k, k)
        made.append(h)
    return made


def test_error_is_within_the_bound_of_plain_steps() -> None:
    """The A-norm error of every x_t, against Cholesky in float64, is within 1/T_{r+1}(1 + 2a)."""
    inputs = leaning(heads=(1, 1, 1))
    del inputs["alpha"]
    eye = torch.eye(16).double()[None, None]
    given = {name: value.float().to(DEVICE) for name, value in inputs.items()}
    x = chunk_gka(
        given["q"], given["k"], torch.zeros_like(given["v"]), gk=given["g"], beta=given["beta"],
        initial_state=(given["h0"], eye.float().to(DEVICE)),
        scale=1.0, num_iter=STEPS, chunk_size=16, solver="adaptive", backend="triton",
    )[0].cpu().double()  # fmt: skip
    bound = 1.0 / torch.cosh((STEPS + 1) * torch.arccosh(torch.tensor(1.0 + 2 * RATIO).double()))
    for t, h in enumerate(states(inputs)):
        matrix = h + RATIO * h.norm() * eye[0, 0]
        exact = torch.linalg.solve(matrix, inputs["q"][0, t, 0])
        error = x[0, t, 0] - exact
        energy, whole = error @ matrix @ error, exact @ matrix @ exact
        assert energy.sqrt() <= (bound + 1e-5) * whole.sqrt()


def test_an_empty_history_is_solved_to_zero(certificates: list) -> None:
    """Zero keys, no states: no steps, x = 0, and every gradient finite."""
    inputs = leaning()
    inputs["k"][:, :20] = 0.0
    inputs["h0"], inputs["u0"] = inputs["h0"] * 0.0, inputs["u0"] * 0.0
    actual = results(inputs, "triton", torch.float32, DEVICE, num_iter=STEPS, solver="adaptive")
    assert (certificates[0].steps[0] == 0).all()
    assert (actual["o"][:, :20] == 0).all()
    assert all(bool(x.isfinite().all()) for x in actual.values())


def test_float16_operands_keep_the_accuracy_of_their_inputs() -> None:
    """With 16-bit inputs and operands, whose sizes do not matter."""
    inputs = leaning()
    inputs["v"] = inputs["v"] * 30.0
    options: dict[str, Any] = {"num_iter": STEPS, "solver": "adaptive"}
    expected = results(inputs, "torch", torch.float64, "cpu", **options)
    actual = results(inputs, "triton", torch.float16, DEVICE, **options)
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 2e-2, key)
