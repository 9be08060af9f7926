"""solver="adaptive" through the public ops: results, gradients, refusals, steps."""

import pytest
import torch
from torch.nn.functional import normalize, silu

from gka.layers import GatedKalmaNet
from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.ops import chunk_gka, fused_recurrent_gka, last_backend, solver_steps, why_unavailable
from problems import Problem, chunkwise, differentiate, make_problem, oracle
from tolerances import RELATIVE, assert_close


def silu_problem(length: int, dtype: torch.dtype = torch.float32, decay: float = -0.05) -> Problem:
    """Keys as a layer makes them once their channels have a mean: SiLU of N(1, 1), unit norm."""
    torch.manual_seed(0)
    q, k = (normalize(silu(torch.randn(1, length, 2, 64) + 1), dim=-1) for _ in range(2))
    g = torch.full((1, length, 2), decay)
    return Problem(
        q=q.to(dtype), k=k.to(dtype), v=torch.randn(1, length, 2, 32).to(dtype), g=g, tied=True
    )


@pytest.mark.parametrize("num_iter", [5, 15, 30])
def test_gradient_of_q_is_that_of_the_computed_map(num_iter):
    """The map is linear and symmetric in q at any number of steps: for every direction, the change of
    sum(o do) along it is <dq, direction>, exactly."""
    p = silu_problem(130, torch.float64)
    _, grads = differentiate(chunkwise, p, num_iter=num_iter, solver="adaptive")
    o, *_ = chunkwise(p, num_iter=num_iter, solver="adaptive")
    generator = torch.Generator().manual_seed(1)  # as `upstream` draws it
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64)
    assert_close((grads["q"] * p.q).sum(), (o * do).sum(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    """Output and gradients lie within the dtype's tolerance, and the truncation, of the exact map."""
    p = silu_problem(200, dtype)
    (o, *_), grads = differentiate(chunkwise, p, solver="adaptive")
    (exact, *_), exact_grads = differentiate(oracle, p.map(lambda x: x.double()))
    truncation = 3 * chebyshev_bound(0.02, 30)  # 2 eps + eps^2 a token, and sums over tokens
    assert o.dtype == dtype
    assert_close(o, exact, RELATIVE[dtype] + truncation, "o")
    for key, grad in grads.items():
        assert_close(grad, exact_grads[key], RELATIVE[dtype] + truncation, f"d{key}")


def test_fewer_steps_where_keys_have_a_mean():
    """SiLU keys with a mean at K = 64: on average 11, 12, 17, 20 of 30 steps at log decays -1e-3 to -1
    (measured 9.7, 10.4, 14.5, 17.5), and no chunk more than 22 (19), the first one included."""
    for decay, mean in ((-1e-3, 11), (-1e-2, 12), (-1e-1, 17), (-1.0, 20)):
        p = silu_problem(512, decay=decay)
        steps = solver_steps(p.k, p.g)
        assert steps.shape == (1, 512, 2) and steps.dtype == torch.int64
        assert steps.double().mean() <= mean and steps.max() <= 22
        assert torch.equal(steps[:, :64], steps[:, :1].expand(1, 64, 2))


def test_steps_follow_from_h_alone_and_bound_themselves():
    """solver_steps takes the write gates, the initial state and packed bounds into account; its steps
    never exceed num_iter, and packed sequences take those they take alone."""
    p = make_problem(0, (4, 2, 1), (16, 8), decay="separate", lengths=[40, 0, 90])
    steps = solver_steps(
        p.k,
        p.gk,
        initial_state=p.h0,
        cu_seqlens=p.cu_seqlens,
        beta=p.beta,
        num_heads=4,
        num_iter=20,
    )
    assert steps.shape == (1, 130, 4) and steps.max() <= 20
    assert p.gk is not None and p.beta is not None and p.h0 is not None
    alone = solver_steps(
        p.k[:, 40:],
        p.gk[:, 40:],
        initial_state=p.h0[2:],
        beta=p.beta[:, 40:],
        num_heads=4,
        num_iter=20,
    )
    assert torch.equal(steps[:, 40:], alone)
    assert (solver_steps(torch.zeros(1, 5, 1, 8)) == 0).all()
    with pytest.raises(ValueError, match="num_iter"):
        solver_steps(p.k, num_iter=-1)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7, 1e-8, 1e-20])
@pytest.mark.parametrize("decay", [-1e-3, -1.0, -20.0, -1000.0])
def test_no_history_is_too_small_or_too_short(decay, size):
    """Tiny keys, strong decays, zero keys and empty histories: finite, and where float64 agrees that
    there is a history, within the truncation of it."""
    base = make_problem(70, dims=(8, 8), dtype=torch.float32)
    assert base.g is not None
    k = size * base.k
    k[:, 20:40] = 0
    p = Problem(
        **{**vars(base), "k": k, "g": torch.full_like(base.g, decay), "h0": torch.zeros(1, 2, 8, 8)}
    )
    (o, *_), grads = differentiate(chunkwise, p, solver="adaptive")
    plain, *_ = chunkwise(p)
    assert all(torch.isfinite(x).all() for x in (o, *grads.values()))
    assert_close(o, plain, 3 * chebyshev_bound(0.02, 30))


def test_all_zero_keys_solve_to_zero():
    """Without any key x_t = 0 and no step is taken."""
    p = silu_problem(70)
    p = Problem(**{**vars(p), "k": torch.zeros_like(p.k)})
    for op in (chunk_gka, fused_recurrent_gka):
        assert (chunkwise(p, op, solver="adaptive")[0] == 0).all()


def test_splitting_changes_the_steps_and_not_the_bound():
    """Other chunk sizes, a split in two and token by token choose other steps; all of them lie within
    twice the truncation of each other."""
    p = silu_problem(200, torch.float64)
    bound = 2 * chebyshev_bound(0.02, 30)
    whole, h, _ = chunkwise(p, solver="adaptive")
    runs = [chunkwise(p, solver="adaptive", chunk_size=size) for size in (16, 200)]
    for other, same, _ in [*runs, chunkwise(p, fused_recurrent_gka, solver="adaptive")]:
        assert_close(other, whole, bound)
        assert_close(same, h, 1e-12)
    assert not torch.equal(solver_steps(p.k, p.g), solver_steps(p.k, p.g, chunk_size=16))


def test_default_is_the_plain_iteration():
    """Without solver=, and with solver="chebyshev", num_iter plain steps run: the same bits."""
    p = silu_problem(100)
    assert torch.equal(chunkwise(p)[0], chunkwise(p, solver="chebyshev")[0])
    assert not torch.equal(chunkwise(p)[0], chunkwise(p, solver="adaptive")[0])


def test_unknown_solver_is_refused_by_name():
    """The error names the choices, in the op and in the layer."""
    p = silu_problem(3)
    for call in (
        lambda: chunk_gka(p.q, p.k, p.v, solver="magic"),
        lambda: fused_recurrent_gka(p.q, p.k, p.v, solver="magic"),
        lambda: GatedKalmaNet(32, head_dim=8, num_heads=2, solver="magic"),
    ):
        with pytest.raises(
            ValueError, match="solver must be one of chebyshev, adaptive, cg; got 'magic'"
        ):
            call()


def test_a_backend_without_it_refuses_it():
    """The reference, which has no adaptive solver, says so; "auto" takes a backend that has."""
    p = silu_problem(3)
    assert "adaptive" in (why_unavailable("reference", solver="adaptive") or "")
    with pytest.raises(RuntimeError, match="it has no solver='adaptive', only chebyshev"):
        chunk_gka(p.q, p.k, p.v, solver="adaptive", backend="reference")
    chunk_gka(p.q, p.k, p.v, solver="adaptive")
    assert last_backend() == "torch"


def test_layer_passes_its_solver_on():
    """GatedKalmaNet(solver="adaptive") is the same layer within the truncation, and not the same bits."""
    torch.manual_seed(0)
    plain = GatedKalmaNet(32, head_dim=16, num_heads=2)
    adaptive = GatedKalmaNet(32, head_dim=16, num_heads=2, solver="adaptive")
    adaptive.load_state_dict(plain.state_dict())
    x = torch.randn(1, 1, 32) + 0.1 * torch.randn(1, 100, 32)  # keys much alike
    a, b = plain(x)[0], adaptive(x)[0]
    assert_close(a, b, 10 * chebyshev_bound(0.02, 30))
    assert not torch.equal(a, b)
