"""fused_recurrent_gka_ and advance_states_: the map of chunk_gka, with the states where they are."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.ops import (
    advance_states_,
    available_backends,
    fused_recurrent_gka,
    fused_recurrent_gka_,
    last_backend,
    why_unavailable,
)
from gka.ops.decode import advance_op, step_op
from stepping import expected as expect
from stepping import make_pool
from tolerances import RELATIVE, assert_close

F32, BF16 = torch.float32, torch.bfloat16
# the Triton kernels are interpreted where there is no GPU, where tests/kernels has their own tests
INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
NO_TRITON = pytest.mark.skipif(not INTERPRETED, reason="interprets the Triton kernels")
BACKENDS = ["torch", pytest.param("triton", marks=NO_TRITON)]

CASES = {
    "one token": {"length": 1},
    "separate decays, grouped heads, odd sizes": {
        "gates": "g gk a b", "tied": False, "heads": (4, 2, 1), "dims": (20, 40), "length": 2,
    },
    "no gates": {"gates": "", "heads": (2, 1, 2), "length": 2},
    "H decays alone": {"gates": "gk", "tied": False, "length": 2},
    "U decays alone": {"gates": "g a", "tied": False, "length": 2},
    "a pool, permuted, with a free slot": {"places": [3, -1, 0], "length": 2},
    "as many tokens as a call takes": {"length": 64, "heads": (1, 1, 1), "batch": 1},
    "K narrower than V": {"dims": (7, 33)},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_chunk_gka(name: str, backend: str) -> None:
    """Output and states in place equal chunk_gka's from the same states; free slots give zeros."""
    pool = make_pool(**CASES[name])
    wanted = expect(pool, num_iter=5)
    ours = pool.to("cpu", F32)
    o = ours.step(num_iter=5, backend=backend)
    assert last_backend() == backend
    for what, actual, value in zip("ohu", (o, ours.h, ours.u), wanted, strict=True):
        assert_close(actual, value, RELATIVE[F32], f"{name}: {what}")
    if pool.indices is not None:
        assert o[pool.indices < 0].abs().max() == 0


def test_float64_states_in_place() -> None:
    """Inputs in float64 keep float64 states, to rounding."""
    pool = make_pool(3, places=[1, 4])
    wanted = expect(pool, num_iter=5)
    ours = pool.fresh()
    o = ours.step(num_iter=5)
    for actual, value in zip((o, ours.h, ours.u), wanted, strict=True):
        assert_close(actual, value, RELATIVE[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_ridge_no_h_is_needed(backend: str) -> None:
    """num_iter = 0 with h_kk None is gated linear attention in place."""
    pool = make_pool(2)
    o_wanted, _, u_wanted = expect(pool, num_iter=0)
    ours = pool.to("cpu", F32)
    o = fused_recurrent_gka_(**ours.named(), num_iter=0, state=(None, ours.u), backend=backend)
    assert_close(o, o_wanted, RELATIVE[F32])
    assert_close(ours.u, u_wanted, RELATIVE[F32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["adaptive", "cg"])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_solvers_keep_the_error_bound(backend: str, solver: str, mean: float) -> None:
    """The output of fewer steps stays within the bound of the 30 plain steps, and is the torch form's."""
    options: dict = {"num_iter": 30, "scale": 1.0}
    pool = make_pool(2, gates="g b", mean=mean, dims=(20, 16), batch=1)
    exact = expect(pool, **options | {"num_iter": 200})[0]
    ours, plain = (pool.to("cpu", F32).fresh() for _ in range(2))
    o = ours.step(solver=solver, backend=backend, **options)
    # o = U^T x: the bound is on x in the A-norm, sqrt(kappa) more in the 2-norm at most
    assert_close(o, exact, 51**0.5 * chebyshev_bound(0.02, 30) * 3)
    # conjugate gradients may stop a step earlier or later in another order of sums
    off = 2 * chebyshev_bound(0.02, 30) if solver == "cg" else RELATIVE[F32]
    assert_close(o, plain.step(solver=solver, **options), off)


@NO_TRITON
@pytest.mark.parametrize(
    "name", ["separate decays, grouped heads, odd sizes", "a pool, permuted, with a free slot"]
)
def test_conjugate_gradients_find_the_exact_solution(name: str) -> None:
    """With the bound of 60 steps output and states are those of the exact solution, in float32, whatever the
    size of the queries."""
    pool = make_pool(**CASES[name])
    pool.tokens["q"] = 1e-12 * pool.tokens["q"]
    wanted = expect(pool, num_iter=120)
    ours = pool.to("cpu", F32)
    o = ours.step(num_iter=60, solver="cg", backend="triton")
    for what, actual, value in zip("ohu", (o, ours.h, ours.u), wanted, strict=True):
        assert_close(actual, value, RELATIVE[F32], f"{name}: {what}")


@NO_TRITON
def test_conjugate_gradients_end_at_a_number_that_is_none() -> None:
    """A query that is NaN gives NaN at its token and head and leaves the others alone; one of 0 gives 0."""
    pool = make_pool(2, gates="g b", batch=1).to("cpu", F32)
    other = pool.fresh()
    pool = replace(pool, tokens=pool.tokens | {"q": pool.tokens["q"].clone()})
    pool.tokens["q"][0, 0, 0, 3] = torch.nan
    pool.tokens["q"][0, 1, 0] = 0.0
    o, wanted = (x.step(solver="cg", backend="triton") for x in (pool, other))
    assert o[0, 0, 0].isnan().all() and (o[0, 1, 0] == 0).all()
    assert torch.equal(o[:, :, 1], wanted[:, :, 1])
    assert torch.equal(pool.h, other.h) and torch.equal(pool.u, other.u)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_u_is_rounded_once_a_call(backend: str) -> None:
    """Arithmetic is float32: o is exact but for the stored U, which is the float32 result rounded."""
    pool = make_pool(3).to("cpu", F32, BF16)
    exact = pool.to("cpu", F32).fresh()
    o, wanted = pool.step(backend=backend, num_iter=5), exact.step(num_iter=5)
    assert_close(o, wanted, RELATIVE[F32])
    assert pool.u.dtype == BF16
    assert_close(pool.u, exact.u, 2.0**-8)
    assert_close(pool.h, exact.h, RELATIVE[F32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("u_dtype", [F32, BF16])
def test_without_commit_nothing_changes(backend: str, u_dtype: torch.dtype) -> None:
    """commit=False gives the same output and leaves every bit of the states."""
    pool = make_pool(3, places=[2, 0]).to("cpu", F32, u_dtype)
    other = pool.fresh()
    o = pool.step(commit=False, num_iter=5, backend=backend)
    assert torch.equal(pool.h, other.h) and torch.equal(pool.u, other.u)
    assert_close(o, other.step(num_iter=5, backend=backend), RELATIVE[F32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [{"places": [4, -1, 1]}, {"batch": 3}], ids=["pool", "batch"])
def test_advance_commits_the_accepted_prefix(backend: str, case: dict) -> None:
    """A run without commit, then advance by n_b tokens, leaves what committing n_b tokens leaves."""
    pool = make_pool(4, heads=(4, 2, 1), dims=(20, 12), gates="g gk a b", tied=False, **case)
    ours, counts = pool.to("cpu", F32), torch.tensor([3, 2, 0])
    ours.step(commit=False, num_iter=2, backend=backend)
    ours.advance(counts, backend=backend)
    wanted = pool.fresh()
    for b, count in enumerate(counts.tolist()):
        place = b if pool.indices is None else int(pool.indices[b])
        if place < 0 or count == 0:
            continue
        tokens = {n: x[b : b + 1] for n, x in wanted.named(count).items()}
        state = (wanted.h[place : place + 1], wanted.u[place : place + 1])
        fused_recurrent_gka_(**tokens, state=state, num_iter=2)
    assert_close(ours.h, wanted.h, RELATIVE[F32], "h")
    assert_close(ours.u, wanted.u, RELATIVE[F32], "u")


def test_counts_beyond_the_tokens_count_as_all() -> None:
    """advance_states_ takes counts outside 0..T as the nearest of them."""
    pool = make_pool(2)
    wanted = pool.fresh()
    pool.advance(torch.tensor([7, -1]))
    wanted.advance(torch.tensor([2, 0]))
    assert torch.equal(pool.h, wanted.h) and torch.equal(pool.u, wanted.u)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
def test_an_empty_history_gives_zero(backend: str, solver: str) -> None:
    """With no history and zero keys (F = 0) x is 0 and the output too, never NaN."""
    pool = make_pool(1, gates="g b").to("cpu", F32)
    pool.h.zero_()
    pool.tokens["k"].zero_()
    o = pool.step(backend=backend, solver=solver)
    assert o.abs().max() == 0 and pool.h.abs().max() == 0


def test_states_of_a_larger_tensor() -> None:
    """States may be places of a larger tensor: what lies between them is left alone."""
    pool = make_pool(2)
    home = torch.full((2, 3, *pool.h.shape[1:]), 7.0, dtype=torch.float64)
    home[:, 1] = pool.h
    wanted = pool.fresh()
    wanted.step()
    u = pool.u.clone()
    fused_recurrent_gka_(**pool.named(), state=(home[:, 1], u))
    assert torch.equal(home[:, 1], wanted.h) and torch.equal(u, wanted.u)
    assert bool((home[:, ::2] == 7.0).all())


BAD = {
    "another head count": ({}, lambda h, u: (h[:, :1], u[:, :1]), r"\(h_kv\) must have shape \[2, 2"),
    "another batch": ({}, lambda h, u: (h[:1], u[:1]), "one state for each of q's 2 sequences; got 1"),
    "H of another width": ({}, lambda h, u: (h[..., :5, :5], u), r"\(h_kk\) must have shape"),
    "H in another dtype": ({}, lambda h, u: (h.bfloat16(), u), r"\(h_kk\) must be torch.float32"),
    "U in another dtype": ({}, lambda h, u: (h, u.half()), "float32 or torch.bfloat16"),
    "no H": ({}, lambda h, u: (None, u), "None only with num_iter = 0"),
    "no pair": ({}, lambda h, u: h, "must be a pair"),
    "transposed": ({}, lambda h, u: (h.mT, u), "contiguous"),
    "overlapping": ({}, lambda h, u: (h[:1].expand_as(h), u), "overlap"),
    "a place that is none": ({"state_indices": torch.tensor([0, 2])}, None, r"in -1\.\.1; got \[0, 2\]"),
    "a place given twice": ({"state_indices": torch.tensor([1, 1])}, None, "at most once"),
    "indices in floats": ({"state_indices": torch.tensor([0.0, 1.0])}, None, "int64 or int32"),
    "too few indices": ({"state_indices": torch.tensor([0])}, None, r"shape \[B\] = \[2\]"),
    "an unknown solver": ({"solver": "magic"}, None, "solver must be"),
    "an unknown backend": ({"backend": "cuda"}, None, "backend must be one of"),
    "a backend without states in place": ({"backend": "reference"}, None, "no states in place"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_the_states(name: str) -> None:
    """What does not fit raises, says what was expected, and leaves every bit of the states."""
    options, change, message = BAD[name]
    pool = make_pool(1).to("cpu", F32)
    before = pool.fresh()
    state = (pool.h, pool.u) if change is None else change(pool.h, pool.u)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        fused_recurrent_gka_(**pool.named(), **{"state": state, **options})
    assert torch.equal(pool.h, before.h) and torch.equal(pool.u, before.u)


def test_more_tokens_than_a_call_takes_are_refused() -> None:
    """65 tokens raise in both ops, naming chunk_gka; the states stay."""
    pool = make_pool(65, heads=(1, 1, 1), batch=1)
    before = pool.fresh()
    for call in (pool.step, lambda: pool.advance(torch.tensor([1]))):
        with pytest.raises(ValueError, match=r"at most 64 tokens.*T = 65.*chunk_gka"):
            call()
    assert torch.equal(pool.h, before.h) and torch.equal(pool.u, before.u)


def test_gradients_are_refused() -> None:
    """Where a gradient is wanted the op says what to call instead; under no_grad it runs."""
    pool = make_pool(1)
    pool.tokens["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no_grad.*or use fused_recurrent_gka"):
        fused_recurrent_gka_(**pool.named(), state=(pool.h, pool.u))
    pool.step()


def test_autograd_notices_a_changed_state() -> None:
    """A graph that saved a state refuses to go back after it was updated in place."""
    pool = make_pool(1)
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    loss = (weight * pool.h).sum()
    pool.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("commit", [True, False])
def test_compiled_equals_eager(commit: bool) -> None:
    """torch.compile(fullgraph=True) gives the eager output and states, bit for bit."""
    pool = make_pool(2, places=[3, 0])
    eager, wanted = pool.fresh(), None
    wanted = eager.step(commit=commit)
    ours = pool.fresh()

    def call(
        tokens: dict,
        h: torch.Tensor,
        u: torch.Tensor,
        indices: torch.Tensor | None,
        n: torch.Tensor,
    ):
        o = fused_recurrent_gka_(**tokens, state=(h, u), state_indices=indices, commit=commit)
        if not commit:
            accepted = {n: x for n, x in tokens.items() if n not in ("q", "alpha")}
            advance_states_(**accepted, counts=n, state=(h, u), state_indices=indices)
        return o

    counts = torch.tensor([1, 2])
    compiled = torch.compile(call, fullgraph=True)
    with torch.no_grad():
        o = compiled(ours.named(), ours.h, ours.u, ours.indices, counts)
    if not commit:
        eager.advance(counts)
    assert torch.equal(o, wanted)
    assert torch.equal(ours.h, eager.h) and torch.equal(ours.u, eager.u)


def test_operators_tell_what_they_change() -> None:
    """torch.library.opcheck finds schema and fake implementation of both operators true to what they do."""
    p = make_pool(2, places=[3, 0]).to("cpu", F32)
    t = p.tokens
    tests = ("test_schema", "test_faketensor")
    numbers = (1.0, 0.02, 3, True, True, "chebyshev", "torch")
    gates = (t["g"], None, t["alpha"], t["beta"])
    torch.library.opcheck(
        step_op, (t["q"], t["k"], t["v"], *gates, p.h, p.u, p.indices, *numbers), test_utils=tests
    )
    counts = torch.tensor([1, 2])
    given = (t["k"], t["v"], t["g"], None, t["beta"], p.h, p.u, p.indices, counts, True, "torch")
    torch.library.opcheck(advance_op, given, test_utils=tests)


def test_which_kernel_runs_can_be_asked() -> None:
    """mode="step" lists the backends of these ops, each with a reason where it cannot run."""
    assert "torch" in available_backends(mode="step")
    assert "reference" not in available_backends(mode="step")
    assert "in place" in (why_unavailable("reference", mode="step") or "")
    assert "Hopper" in (why_unavailable("hopper", mode="step") or "")
    assert why_unavailable("torch", dtype=torch.float64, solver="adaptive", mode="step") is None
    assert why_unavailable("torch", solver="cg", mode="step") is None
    for backend in ("triton", "hopper"):
        told = why_unavailable(backend, mode="step")
        assert why_unavailable(backend, solver="cg", mode="step") == told


@NO_TRITON
def test_functional_form_runs_the_kernel() -> None:
    """fused_recurrent_gka of the Triton backend, on packed sequences, equals the torch form."""
    pool = make_pool(6, heads=(2, 1, 2), batch=1).to("cpu", F32)
    h, u = (torch.cat([x, x * 2, x * 3]) for x in (pool.h, pool.u))
    bounds = torch.tensor([0, 2, 2, 6])
    options: dict = {"initial_state": (h, u), "output_final_state": True, "cu_seqlens": bounds}
    results = [
        fused_recurrent_gka(**pool.named(), num_iter=4, backend=backend, **options)
        for backend in ("triton", "torch")
    ]
    (o, final), (o_wanted, wanted) = results
    assert final is not None and wanted is not None
    for actual, value in zip((o, *final), (o_wanted, *wanted), strict=True):
        assert_close(actual, value, RELATIVE[F32])
    assert torch.equal(h[:1], pool.h) and torch.equal(u[:1], pool.u)
