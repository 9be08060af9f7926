"""On a GPU: outputs, states and all gradients of the kernels against the torch form in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.ops import solver_steps
from on_gpu import (
    BACKENDS,
    DEVICE,
    SETTINGS,
    assert_all_close,
    float64,
    gpu_problem,
    leaning,
    like_a_layer,
    on_device,
    run,
    skip_unless_available,
    upstream,
)
from problems import Problem, chunkwise, make_problem
from tolerances import RELATIVE, assert_close, relative_error

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PACKED = [0, 1, 15, 64, 200, 500]
GROUPED = (4, 2, 1)

# Few on purpose: every combination of dtype, head dims, heads and options compiles its own kernels.
CASES: dict[str, dict[str, Any]] = {
    "bfloat16 128 x 128, two sequences": {"dtype": BF16, "dims": (128, 128), "batch": 2},
    "float32 128 x 128": {"dtype": F32, "dims": (128, 128)},
    "float16 64 x 64": {"dtype": F16, "dims": (64, 64)},
    "bfloat16 64 x 128, grouped, packed, decay of H only, beta": {
        "dtype": BF16, "dims": (64, 128), "heads": GROUPED, "lengths": PACKED,
        "decay": "of H only", "gates": "b",
    },
    "float32 20 x 96, grouped, packed, separate decays": {
        "dtype": F32, "dims": (20, 96), "heads": GROUPED, "lengths": PACKED, "decay": "separate",
    },
    "bfloat16 96 x 200, no decay, no gates, no states": {
        "dtype": BF16, "dims": (96, 200), "decay": "absent", "gates": "", "states": False,
    },
    "float16 200 x 20, decay of U only, alpha": {
        "dtype": F16, "dims": (200, 20), "decay": "of U only", "gates": "a",
    },
    "bfloat16 256 x 256": {"dtype": BF16, "dims": (256, 256)},
    "float32 16 x 256, separate decays": {"dtype": F32, "dims": (16, 256), "decay": "separate"},
    "bfloat16 64 x 64, no ridge": {"dtype": BF16, "dims": (64, 64), "num_iter": 0},
}  # fmt: skip


# those that Hopper's kernels take, grouped heads, packed sequences and both 16-bit dtypes among them
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_result_is_that_of_float64(name: str, backend: str) -> None:
    """Head dims from 16 to 256, dtypes, gates, decays, grouped heads and packed sequences: each result
    is within its dtype's tolerance of float64."""
    case = dict(CASES[name])
    dtype, num_iter = case.pop("dtype"), case.pop("num_iter", 30)
    problem = gpu_problem(200, dtype, **case)
    skip_unless_available(problem, backend)
    expected = float64(problem, num_iter=num_iter)
    assert_all_close(
        run(problem, num_iter=num_iter, backend=backend), expected, RELATIVE[dtype], name
    )


@pytest.mark.parametrize("value", [-torch.inf, -1e18, torch.finfo(F32).min])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("dims", [(128, 128), (64, 64)], ids=str)
def test_hard_resets_are_those_of_float64(
    dims: tuple[int, int], settings: dict, value: float
) -> None:
    """A log decay whose exp is 0, at a chunk's first and last token and inside, several in a chunk."""
    problem = make_problem(300, dims=dims, batch=2)
    assert problem.g is not None
    g = problem.g.clone()
    g[0, [3, 40, 41, 63, 64, 191, 250]] = value
    g[1, 5:60] = value
    problem = on_device(replace(problem, g=g), BF16)
    expected = float64(problem, num_iter=30)
    tolerance = RELATIVE[BF16]
    assert_all_close(run(problem, num_iter=30, **settings), expected, tolerance, "resets")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["k", "v", "beta", "g"])
def test_nonfinite_tokens_stay_in_their_chunk(name: str, backend: str, value: float) -> None:
    """On a GPU a bad number at token 100 reaches no chunk before its own, no other head, no other
    sequence, and is not hidden behind it (docs/numerics.md says why the chunk is not spared)."""
    problem = gpu_problem(300, BF16, dims=(128, 128), batch=2, gates="ab")
    skip_unless_available(problem, backend)
    bad = getattr(problem, name).clone()
    bad[0, 100, 1] = value
    o = chunkwise(problem, backend=backend)[0]
    found = chunkwise(replace(problem, **{name: bad}), backend=backend)[0]
    assert torch.equal(found[1], o[1]) and torch.equal(found[0, :, 0], o[0, :, 0])
    assert torch.equal(found[0, :64, 1], o[0, :64, 1])
    assert not torch.isfinite(found[0, 100:, 1]).all(-1).any()


ADAPTIVE: dict[str, dict[str, Any]] = {
    "bfloat16 128 x 128": {"dtype": BF16, "dims": (128, 128), "batch": 2},
    "bfloat16 64 x 64": {"dtype": BF16, "dims": (64, 64)},
    "float16 64 x 128, grouped, packed, separate decays": {
        "dtype": F16, "dims": (64, 128), "heads": GROUPED, "lengths": PACKED, "decay": "separate",
    },
    # twice the steps: of the map to within float32's tolerance
    "float32 64 x 128": {"dtype": F32, "dims": (64, 128), "num_iter": 60},
    "bfloat16 256 x 256": {"dtype": BF16, "dims": (256, 256)},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["adaptive", "cg"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_result_of_fewer_steps_is_that_of_float64(
    name: str, solver: str, backend: str
) -> None:
    """Keys for which chunks take fewer steps: each result is within its dtype's tolerance of the same map's
    in float64, or with conjugate gradients, whose map is not linear, of the exact solution's."""
    case = dict(ADAPTIVE[name])
    dtype, num_iter = case.pop("dtype"), case.pop("num_iter", 30)
    problem = leaning(gpu_problem(500, dtype, **case))
    skip_unless_available(problem, backend)
    options: dict[str, Any] = {"num_iter": num_iter, "solver": solver}
    steps = steps_of(problem, backend=backend, **options)
    assert steps.shape == problem.q.shape[:3] and (steps <= num_iter).all()
    assert (steps < num_iter).any()
    found = run(problem, backend=backend, **options)
    expected = float64(problem, **(options if solver == "adaptive" else {"num_iter": 120}))
    assert_all_close(found, expected, RELATIVE[dtype], name)


def steps_of(problem: Problem, solver: str, **options: Any) -> Tensor:
    """Steps of each token's chunk as the backend itself counts them."""
    p = problem
    return solver_steps(
        p.k, p.g if p.tied else p.gk, initial_state=p.h0, beta=p.beta, cu_seqlens=p.cu_seqlens,
        num_heads=p.q.shape[2], value_dim=p.v.shape[3], solver=solver,
        q=p.q if solver == "cg" else None, **options,
    )  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, -0.02, -0.5, -5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugate_gradients_take_the_steps_of_the_torch_form(backend: str, decay: float) -> None:
    """bfloat16, K = V = 128: at any decay float16 operands cost a chunk at most eight steps. Their rounding
    fills the spectrum of an H that is made of few keys."""
    problem = like_a_layer(500, 4, 128, BF16)
    assert problem.g is not None
    problem = replace(problem, g=torch.full_like(problem.g, decay))
    skip_unless_available(problem, backend)
    found = steps_of(problem, "cg", backend=backend)
    wanted = steps_of(problem.map(lambda x: x.float()), "cg", backend="torch")
    assert (found - wanted).abs().max() <= 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugate_gradients_with_a_tiny_ridge_end_and_are_finite(backend: str) -> None:
    """W over lambda would leave float16's range: the unit of A d has a least value."""
    problem = gpu_problem(200, BF16, dims=(128, 128))
    found = run(problem, backend=backend, solver="cg", ridge_ratio=1e-6, num_iter=60)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_no_number_stays_in_its_row(backend: str) -> None:
    """With conjugate gradients a NaN in q ends as NaN in its own output. No other chunk changes by a bit, and
    no other token of its chunk by more than rounding."""
    problem = gpu_problem(300, BF16, dims=(128, 128))
    skip_unless_available(problem, backend)
    bad = problem.q.clone()
    bad[0, 100, 1, 5] = torch.nan
    o = chunkwise(problem, backend=backend, solver="cg")[0]
    found = chunkwise(replace(problem, q=bad), backend=backend, solver="cg")[0]
    assert found[0, 100, 1].isnan().all()
    found[0, 100, 1] = o[0, 100, 1]
    assert_close(found[0, 64:128, 1], o[0, 64:128, 1], 1e-3)
    found[0, 64:128, 1] = o[0, 64:128, 1]
    assert torch.equal(found, o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_any_length(length: int, backend: str) -> None:
    """Lengths around the chunk's and far from it."""
    problem = gpu_problem(length, BF16, dims=(128, 128), batch=2)
    assert_all_close(run(problem, backend=backend), float64(problem), RELATIVE[BF16])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_groups_of_heads(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative works on a few heads at a time where scratch memory is short: same results."""
    problem = gpu_problem(1000, BF16, dims=(128, 128), heads=(6, 3, 6))
    monkeypatch.setattr(
        "gka.kernels.backward.CHUNK_HEADS", 64
    )  # 16 chunks: two groups of four and two
    assert_all_close(run(problem, **settings), float64(problem), RELATIVE[BF16])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_strong_decay_and_empty_history(settings: dict) -> None:
    """Decays of e^-100 that empty the memory, zero keys, and a history that starts with none:
    everything is finite and right."""
    problem = make_problem(200, dims=(128, 128), batch=2)
    assert problem.g is not None and problem.h0 is not None and problem.u0 is not None
    problem.g[:, 3::7] = -100.0
    problem.k[:, :70] = 0.0
    problem.k[:, 100::7] = 0.0  # not where all is forgotten: float32 has no (e^-100)^2
    problem = replace(problem, h0=torch.zeros_like(problem.h0), u0=torch.zeros_like(problem.u0))
    problem = on_device(problem, BF16)
    results = run(problem, **settings)
    assert_all_close(results, float64(problem), RELATIVE[BF16])
    assert (results["o"][:, :70] == 0).all()


def test_every_form_of_an_upstream_gradient() -> None:
    """Only the output, only H or only U is differentiated: the others' gradients count as zero."""
    problem = gpu_problem(200, BF16, dims=(128, 128), batch=2)
    every = upstream(problem)
    for kept in range(3):
        weights = tuple(w if i == kept else torch.zeros_like(w) for i, w in enumerate(every))
        exact = run(problem.map(lambda x: x.double()), weights, backend="torch")
        assert_all_close(run(problem, weights), exact, RELATIVE[BF16], f"result {kept} alone:")


# Relative 2-norm errors of the operator released with the paper, on inputs like these.
CEILING = {
    "x": 2.4e-3, "o": 1.1e-2, "dq": 1.2e-2, "dk": 3.4e-2, "dv": 2.6e-2, "dalpha": 1.8e-2,
    "dg": 1.3e-2,
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_less_accurate_than_the_released_operator(settings: dict) -> None:
    """bfloat16, K = V = 128, T = 512, 4 heads, 30 steps, SiLU keys with a mean, against the exact solution
    for the same inputs: no result is further off than the released operator's."""
    problem = like_a_layer(512, 4, 128, BF16)
    scale = 128**-0.5
    weights = upstream(problem)
    silent = (weights[0], torch.zeros_like(weights[1]), torch.zeros_like(weights[2]))
    wide = problem.map(lambda x: x.double())
    exact = run(wide, silent, num_iter=120, scale=scale, backend="torch")
    found = run(problem, silent, num_iter=30, scale=scale, **settings)
    errors = {name: relative_error(found[name], exact[name]) for name in CEILING if name != "x"}
    errors["x"] = error_of_x(settings)
    print(f"\nrelative errors, {settings} (ceiling):")
    for name, ceiling in CEILING.items():
        print(f"  {name:7} {errors[name]:.2e} ({ceiling:.1e})")
    worse = {name: error for name, error in errors.items() if not error <= CEILING[name]}
    assert not worse, f"further off than {CEILING}: {worse}"


def error_of_x(settings: dict[str, Any]) -> float:
    """The solutions, read out through U = I: no values, no decay of U, no mix. Rounding of o included."""
    problem = like_a_layer(512, 4, 128, BF16)
    eye = torch.eye(128, device=DEVICE).expand(1, 4, 128, 128).contiguous()
    problem = replace(
        problem, v=torch.zeros_like(problem.v), gk=problem.g, g=None, alpha=None, tied=False,
        h0=torch.zeros_like(eye), u0=eye,
    )  # fmt: skip
    wide = problem.map(lambda x: x.double())
    exact = run(wide, num_iter=120, backend="torch")["o"]
    return relative_error(run(problem, num_iter=30, **settings)["o"], exact)
