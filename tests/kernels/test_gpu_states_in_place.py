"""On a GPU: every kernel of fused_recurrent_gka_ and advance_states_; accuracy, graphs, memory, waiting."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gka.ops import fused_recurrent_gka, fused_recurrent_gka_, last_backend, why_unavailable
from stepping import Pool, expected, make_pool
from tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.gpu

DEVICE, F32, BF16, F16 = "cuda", torch.float32, torch.bfloat16, torch.float16
BACKENDS = ("triton", "hopper")
SOLVERS = ("chebyshev", "adaptive", "cg")
WIDE: dict[str, Any] = {"dims": (128, 128), "heads": (4, 2, 4)}


def skip_unless_available(backend: str, dims: tuple[int, int]) -> None:
    reason = why_unavailable(backend, DEVICE, BF16, dims=dims, mode="step")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def rounded(pool: Pool, dtype: torch.dtype, u_dtype: torch.dtype = F32) -> tuple[Pool, Pool]:
    """The pool as the kernels get it, and the same rounded values in float64."""
    ours = pool.to(DEVICE, dtype, u_dtype)
    return ours, ours.to("cpu", torch.float64)


def check(pool: Pool, dtype: torch.dtype, u_dtype: torch.dtype, backend: str, **options: Any):
    """Output and states against chunk_gka in float64 on the same rounded inputs."""
    ours, exact = rounded(pool, dtype, u_dtype)
    wanted = expected(exact, **options)
    o = ours.step(backend=backend, **options)
    assert last_backend() == backend
    assert_close(o.cpu(), wanted[0], max(RELATIVE[F32], RELATIVE[dtype]), "o")
    assert_close(ours.h.cpu(), wanted[1], RELATIVE[F32], "h")
    assert_close(ours.u.cpu(), wanted[2], RELATIVE[F32] if u_dtype == F32 else 2.0**-8, "u")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_equals_chunk_gka_in_float64(backend: str, dims: tuple[int, int], length: int) -> None:
    """Every width, dtype, both storages of U, pools, grouped heads and separate decays, at 30 steps."""
    skip_unless_available(backend, dims)
    options: dict = {"dims": dims, "heads": (4, 2, 1), "places": [3, -1, 0, 1]}
    check(make_pool(length, gates="g gk a b", tied=False, **options), BF16, BF16, backend)
    if dims == (128, 128):  # each is a kernel to be compiled
        check(make_pool(length, **options), F32, F32, backend)
        check(make_pool(length, gates="", **options), F16, F32, backend)


@pytest.mark.parametrize("dims", [(7, 33), (96, 200), (256, 256)], ids=str)
def test_other_widths_run_the_triton_kernel(dims: tuple[int, int]) -> None:
    """ "auto" takes the Triton kernel where the Hopper one has no such width."""
    pool = make_pool(2, dims=dims)
    check(pool, F32, F32, "triton")
    pool.to(DEVICE, F32).step()
    assert last_backend() == "triton"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [0.0, 0.5, 2.0])
def test_adaptive_equals_the_torch_form(backend: str, mean: float) -> None:
    """The adaptive solver takes the steps of the torch form in float32: same output to rounding."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(2, mean=mean, **WIDE)
    o = pool.to(DEVICE, F32).step(backend=backend, solver="adaptive")
    assert_close(o.cpu(), pool.to("cpu", F32).step(solver="adaptive"), RELATIVE[F32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_conjugate_gradients_find_the_exact_solution(
    backend: str, dims: tuple[int, int], mean: float
) -> None:
    """With the bound of 60 steps output and states are those of the exact solution, in float32."""
    skip_unless_available(backend, dims)
    pool = make_pool(5, dims=dims, heads=(4, 2, 1), places=[3, -1, 0, 1], mean=mean)
    ours, exact = rounded(pool, F32)
    wanted = expected(exact, num_iter=120)
    o = ours.step(backend=backend, solver="cg", num_iter=60)
    for name, actual, value in zip("ohu", (o, ours.h, ours.u), wanted, strict=True):
        assert_close(actual.cpu(), value, RELATIVE[F32], name)


@pytest.mark.parametrize("dims", [(7, 33), (256, 256)], ids=str)
def test_conjugate_gradients_at_other_widths(dims: tuple[int, int]) -> None:
    """The Triton kernel takes them at every width."""
    ours, exact = rounded(make_pool(2, dims=dims), F32)
    o = ours.step(backend="triton", solver="cg", num_iter=60)
    assert_close(o.cpu(), expected(exact, num_iter=120)[0], RELATIVE[F32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_history_gives_zero(backend: str, solver: str) -> None:
    """F = 0: x is 0 and o too."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(1, gates="g b", **WIDE).to(DEVICE, F32)
    pool.h.zero_()
    pool.tokens["k"].zero_()
    assert pool.step(backend=backend, solver=solver).abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("u_dtype", [F32, BF16])
@pytest.mark.parametrize("length", [1, 4])
def test_without_commit_then_advance(backend: str, u_dtype: torch.dtype, length: int) -> None:
    """A run without commit leaves every bit; advance then equals committing the accepted tokens alone."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(length, places=[2, 0, -1], **WIDE).to(DEVICE, BF16, u_dtype)
    ours, other = pool.fresh(), pool.fresh()
    o = ours.step(commit=False, backend=backend)
    assert torch.equal(ours.h, pool.h) and torch.equal(ours.u, pool.u)
    assert_close(o, other.step(backend=backend), RELATIVE[BF16])
    counts = torch.tensor([length, length - 1, length], device=DEVICE)
    ours.advance(counts, backend=backend)
    wanted = pool.fresh()
    for b, count in enumerate(counts.tolist()[:2]):
        if count:
            place = int(pool.indices[b])  # pyright: ignore[reportOptionalSubscript]
            tokens = {n: x[b : b + 1] for n, x in pool.named(count).items()}
            tokens |= {"gk": tokens["g"]}
            state = (wanted.h[place : place + 1], wanted.u[place : place + 1])
            fused_recurrent_gka_(**tokens, state=state, backend=backend)
    assert_close(ours.h, wanted.h, RELATIVE[F32], "h")
    assert_close(ours.u, wanted.u, RELATIVE[F32] if u_dtype == F32 else 2.0**-8, "u")


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_outside_the_pool_are_skipped(backend: str) -> None:
    """Indices beyond the pool write nowhere: zeros, and the states as they were (GKA_DEBUG=1 raises)."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(2, places=[1, 4], **WIDE).to(DEVICE, F32)
    before = pool.fresh()
    assert pool.indices is not None
    pool.indices.copy_(torch.tensor([5, 1 << 20]))
    assert pool.step(backend=backend).abs().max() == 0
    pool.advance(torch.tensor([2, 2], device=DEVICE), backend=backend)
    assert torch.equal(pool.h, before.h) and torch.equal(pool.u, before.u)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_cuda_graph_goes_on_from_the_states(backend: str, solver: str) -> None:
    """A captured step, replayed on new tokens and indices, gives what eager calls give, bit for bit."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(1, places=[0, 3], **WIDE).to(DEVICE, BF16)
    options: dict = {"backend": backend, "solver": solver}
    captured, eager = pool.fresh(), pool.fresh()
    pool.fresh().step(**options)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = captured.step(**options)
    for seed, places in ((1, [0, 3]), (2, [4, -1]), (3, [3, 1])):
        new = make_pool(1, places=places, seed=seed, **WIDE).to(DEVICE, BF16)
        for name, x in new.tokens.items():
            pool.tokens[name].copy_(x)
        assert pool.indices is not None and new.indices is not None
        pool.indices.copy_(new.indices)
        graph.replay()
        assert torch.equal(o, eager.step(**options))
        assert torch.equal(captured.h, eager.h) and torch.equal(captured.u, eager.u)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_neither_waits_nor_copies_a_state(backend: str) -> None:
    """No call waits for the device, and memory grows by less than a state."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(1, places=[0, 3], **WIDE).to(DEVICE, BF16)
    counts = torch.tensor([1, 0], device=DEVICE)

    def both() -> None:
        pool.step(backend=backend, commit=False)
        pool.advance(counts, backend=backend)
        pool.step(backend=backend)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < pool.h[0].nbytes // 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_heads_are_read_where_they_lie(backend: str) -> None:
    """q, k and v as parts of one fused projection give the result of their copies, bit for bit."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(2, dims=(128, 128), batch=3).to(DEVICE, BF16)
    other = pool.fresh()
    fused = torch.cat([pool.tokens[n].flatten(2) for n in "qkv"], -1)
    parts = fused.split(fused.shape[-1] // 3, -1)
    strided: dict[str, Any] = {
        n: x.unflatten(-1, (-1, 128)) for n, x in zip("qkv", parts, strict=True)
    }
    o = fused_recurrent_gka_(**(other.named() | strided), state=(other.h, other.u), backend=backend)
    assert torch.equal(o, pool.step(backend=backend))
    assert torch.equal(pool.u, other.u)


def test_compiled_equals_eager() -> None:
    """torch.compile(fullgraph=True) of the op gives the eager result, bit for bit."""
    pool = make_pool(1, places=[0, 3], **WIDE).to(DEVICE, BF16)
    ours, eager = pool.fresh(), pool.fresh()
    call = torch.compile(fused_recurrent_gka_, fullgraph=True)
    with torch.no_grad():
        o = call(**ours.named(), state=(ours.h, ours.u), state_indices=ours.indices)
    assert torch.equal(o, eager.step())
    assert torch.equal(ours.h, eager.h) and torch.equal(ours.u, eager.u)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_form_of_packed_sequences(backend: str) -> None:
    """fused_recurrent_gka on packed sequences, one of them empty: outputs, states and a gradient."""
    skip_unless_available(backend, (128, 128))
    pool = make_pool(70, dims=(128, 128), batch=1).to(DEVICE, BF16)
    bounds = torch.tensor([0, 66, 66, 70], device=DEVICE)
    results = []
    for name, dtype in ((backend, BF16), ("torch", torch.float64)):
        given = pool.to(DEVICE, dtype)
        given.tokens["v"].requires_grad_()
        o, final = fused_recurrent_gka(
            **given.named(), backend=name, output_final_state=True, cu_seqlens=bounds
        )
        assert final is not None
        (dv,) = torch.autograd.grad(o.float().square().sum(), [given.tokens["v"]])
        results.append([x.detach() for x in (o, *final, dv)])
    names = ("o", "h", "u", "dv")
    tolerances = (RELATIVE[BF16], RELATIVE[F32], RELATIVE[F32], RELATIVE[BF16])
    for name, actual, value, tolerance in zip(names, *results, tolerances, strict=True):
        assert_close(actual, value, tolerance, name)


def test_misaligned_states_are_refused() -> None:
    """States that begin between multiples of 16 bytes raise; nothing is written."""
    pool = make_pool(1, **WIDE).to(DEVICE, F32)
    memory: Tensor = torch.zeros(pool.h.numel() + 1, device=DEVICE)
    h = memory[1:].view(pool.h.shape)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        fused_recurrent_gka_(**pool.named(), state=(h, pool.u))
    assert memory.abs().max() == 0
