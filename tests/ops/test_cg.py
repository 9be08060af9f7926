"""solver="cg" through the public ops: results, gradients, causality, refusals, steps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize, silu

from gka.layers import GatedKalmaNet
from gka.maths.solvers.chebyshev import chebyshev_bound, chebyshev_error
from gka.ops import (
    available_backends,
    chunk_gka,
    fused_recurrent_gka,
    fused_recurrent_gka_,
    last_backend,
    solver_steps,
    why_unavailable,
)
from problems import SOLVER_PROBLEMS as PROBLEMS
from problems import Problem, chunkwise, differentiate, make_problem, oracle
from tolerances import RELATIVE, assert_close

TARGET = chebyshev_error(0.02, 30)


def silu_problem(length: int, dtype: torch.dtype = torch.float32, decay: float = -0.05) -> Problem:
    """Queries and keys as a layer makes them: SiLU of Gaussians, unit norm."""
    torch.manual_seed(0)
    q, k = (normalize(silu(torch.randn(1, length, 2, 64)), dim=-1) for _ in range(2))
    g = torch.full((1, length, 2), decay)
    beta = torch.rand(1, length, 2)
    v = torch.randn(1, length, 2, 32)
    return Problem(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), g=g, beta=beta, tied=True)


@pytest.mark.parametrize("num_iter", [10, 30, 60])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_within_the_target(name, num_iter):
    """Outputs and gradients at r steps are off by no more than some times what r Chebyshev steps guarantee:
    2 eps + eps^2 a token, and sums over tokens."""
    problem, target = PROBLEMS[name], chebyshev_error(0.02, num_iter)
    results, grads = differentiate(chunkwise, problem, num_iter=num_iter, solver="cg")
    exact, exact_grads = differentiate(oracle, problem)
    assert_close(results[0], exact[0], 2 * target)
    for key, grad in grads.items():
        assert_close(grad, exact_grads[key], 5 * target, f"d{key}")


@pytest.mark.parametrize("decay", [-1e-4, -0.005, -0.1, -1.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype, decay):
    """Output and gradients lie within the dtype's tolerance, and the target, of the exact map."""
    p = silu_problem(200, dtype, decay)
    (o, *_), grads = differentiate(chunkwise, p, solver="cg")
    (exact, *_), exact_grads = differentiate(oracle, p.map(lambda x: x.double()))
    assert o.dtype == dtype
    assert_close(o, exact, RELATIVE[dtype] + TARGET, "o")
    for key, grad in grads.items():
        assert_close(grad, exact_grads[key], RELATIVE[dtype] + 5 * TARGET, f"d{key}")


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**-30, 2.0**30])
def test_gradients_scale_with_the_loss(scale):
    """A loss times a power of two has gradients times that factor: the adjoint solve looks at no size."""
    p = silu_problem(100).leaves()

    def gradients(factor: float) -> list[torch.Tensor]:
        o = chunkwise(p, solver="cg")[0]
        return list(torch.autograd.grad((o * factor).sum(), list(p.tensors().values())))

    for x, y in zip(gradients(scale), gradients(1.0), strict=True):
        assert_close(x.double() / scale, y, 1e-6)


def test_fewer_steps_at_every_decay():
    """SiLU keys at K = 64 take at most 20 steps a chunk where the bound takes 30, at all decays."""
    for decay in (-1e-4, -2e-3, -5e-3, -2e-2, -1e-1, -0.5, -1.2):
        p = silu_problem(512, decay=decay)
        steps = solver_steps(p.k, p.g, solver="cg", q=p.q, beta=p.beta)
        assert steps.shape == (1, 512, 2) and steps.dtype == torch.int64
        assert steps.double().mean() > 5 and steps.max() <= 20
        assert torch.equal(steps[:, :64], steps[:, :1].expand(1, 64, 2))


def test_steps_of_packed_sequences_are_those_alone():
    """`solver_steps` takes gates, states and bounds into account."""
    p = make_problem(0, (4, 2, 1), (16, 8), decay="separate", lengths=[40, 0, 90])
    assert p.gk is not None and p.beta is not None and p.h0 is not None
    steps = solver_steps(
        p.k, p.gk, initial_state=p.h0, cu_seqlens=p.cu_seqlens, beta=p.beta, solver="cg", q=p.q
    )
    alone = solver_steps(
        p.k[:, 40:], p.gk[:, 40:], initial_state=p.h0[2:], beta=p.beta[:, 40:], solver="cg",
        q=p.q[:, 40:],
    )  # fmt: skip
    assert torch.equal(steps[:, 40:], alone) and steps.max() <= 39
    zero = torch.zeros(1, 5, 1, 8)
    assert (solver_steps(zero, solver="cg", q=zero + 1.0) == 0).all()


def test_steps_ask_for_queries_where_they_matter():
    """ "cg" needs q, "adaptive" takes none, "chebyshev" has nothing to tell; heads must agree."""
    k = torch.randn(1, 5, 2, 8)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"solver": "cg"}, 'q must be given with solver="cg"'),
        ({"q": k}, "q must be None with solver='adaptive'"),
        ({"solver": "chebyshev"}, "solver must be adaptive or cg"),
        ({"solver": "cg", "q": k, "num_heads": 4}, "num_heads must be q's 2 heads; got 4"),
        ({"solver": "cg", "q": k[0]}, "q must have 4 dimensions"),
        ({"solver": "cg", "q": k, "backend": "reference"}, "it has no solver='cg'"),
    ]
    for options, message in wrong:
        with pytest.raises((ValueError, RuntimeError), match=message):
            solver_steps(k, **options)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7, 1e-8, 1e-20])
@pytest.mark.parametrize("decay", [-1e-3, -1.0, -20.0, -1000.0])
def test_no_history_is_too_small_or_too_short(decay, size):
    """Tiny keys, strong decays, zero keys and empty histories: finite, and within the bounds of the plain
    iteration's results."""
    base = make_problem(70, dims=(8, 8), dtype=torch.float32)
    assert base.g is not None
    k = size * base.k
    k[:, 20:40] = 0
    p = replace(base, k=k, g=torch.full_like(base.g, decay), h0=torch.zeros(1, 2, 8, 8))
    (o, *_), grads = differentiate(chunkwise, p, solver="cg")
    plain, *_ = chunkwise(p)
    assert all(torch.isfinite(x).all() for x in (o, *grads.values()))
    assert_close(o, plain, 3 * chebyshev_bound(0.02, 30))


def test_zero_and_repeated_keys():
    """Without any key x_t = 0 and no step is taken; with one key again and again two steps suffice."""
    p = silu_problem(70)
    none = replace(p, k=torch.zeros_like(p.k))
    for op in (chunk_gka, fused_recurrent_gka):
        assert (chunkwise(none, op, solver="cg")[0] == 0).all()
    one = replace(p, k=p.k[:, :1].expand_as(p.k))
    (o, *_), grads = differentiate(chunkwise, one, solver="cg")
    (exact, *_), exact_grads = differentiate(oracle, one.map(lambda x: x.double()))
    assert solver_steps(one.k, one.g, solver="cg", q=one.q, beta=one.beta).max() <= 3
    assert_close(o, exact, RELATIVE[torch.float32])
    for key, grad in grads.items():
        assert_close(grad, exact_grads[key], 5 * RELATIVE[torch.float32], key)


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1.0, 1e3, 1e9])
def test_ridges_of_any_size(ratio):
    """Float32 at ratios of all sizes: finite, and within the target and rounding of the exact output."""
    p = silu_problem(70)
    o, *_ = chunkwise(p, solver="cg", ridge_ratio=ratio)
    exact, *_ = oracle(p.map(lambda x: x.double()), ridge_ratio=ratio)
    if ratio >= 1e-3:  # below, 30 steps guarantee nothing
        assert_close(o, exact, chebyshev_error(ratio, 30) + 1e-4)
    assert torch.isfinite(o).all()


def test_alpha_zero_is_linear_attention():
    """With alpha = 0 the solve does not matter: the output is that of num_iter = 0."""
    p = make_problem(70)
    p = replace(p, alpha=torch.zeros_like(p.q[..., 0]))
    assert_close(chunkwise(p, solver="cg")[0], chunkwise(p, num_iter=0)[0], 1e-12)


def test_later_tokens_change_nothing():
    """Causality is exact: no bit of an output depends on later queries, keys or gates of its chunk."""
    p = silu_problem(64)
    changed = p.map(lambda x: torch.cat([x[:, :40], x[:, 40:].roll(7, 1)], 1))
    assert torch.equal(
        chunkwise(changed, solver="cg")[0][:, :40], chunkwise(p, solver="cg")[0][:, :40]
    )


def test_chunks_do_not_matter_beyond_the_target():
    """Other chunk sizes, and token by token, lie within twice the target of each other at every token: a
    token depends on its own system alone, but the iteration makes much of rounding."""
    p = silu_problem(200, torch.float64)
    whole, h, _ = chunkwise(p, solver="cg")
    runs = [chunkwise(p, solver="cg", chunk_size=size) for size in (16, 200)]
    for other, same, _ in [*runs, chunkwise(p, fused_recurrent_gka, solver="cg")]:
        error = (other - whole).norm(dim=-1) / whole.norm(dim=-1)
        assert error.max() <= 2 * TARGET
        assert_close(same, h, 1e-12)


def test_states_in_place():
    """`fused_recurrent_gka_` leaves the output and the states of `fused_recurrent_gka`."""
    p = make_problem(9, (2, 1, 2), (8, 4), dtype=torch.float32)
    assert p.h0 is not None and p.u0 is not None
    o, h, u = chunkwise(p, fused_recurrent_gka, solver="cg")
    state = (p.h0.clone(), p.u0.clone())
    found = fused_recurrent_gka_(
        p.q, p.k, p.v, p.g, p.g, p.alpha, 1.0, beta=p.beta, state=state, solver="cg"
    )
    assert torch.equal(found, o) and torch.equal(state[0], h) and torch.equal(state[1], u)


def test_every_backend_but_the_reference_has_it():
    """The reference says what it has; the others run it wherever they run plain steps, and "auto" takes the
    same of them."""
    p = silu_problem(3)
    told = "it has no solver='cg', only chebyshev"
    assert told in (why_unavailable("reference", solver="cg") or "")
    with pytest.raises(RuntimeError, match=told):
        chunk_gka(p.q, p.k, p.v, solver="cg", backend="reference")
    for device in ("cpu", "cuda"):
        plain = available_backends(device, torch.bfloat16)
        found = available_backends(device, torch.bfloat16, "cg")
        assert found == [name for name in plain if name != "reference"]
        steps = available_backends(device, torch.bfloat16, mode="step")
        assert available_backends(device, torch.bfloat16, "cg", mode="step") == steps
    chunk_gka(p.q, p.k, p.v, solver="cg")
    assert last_backend() == available_backends(solver="cg")[0]


def test_layer_passes_its_solver_on():
    """GatedKalmaNet(solver="cg") is the same layer within the target, and not the same bits; a cached text
    and one read at once agree."""
    torch.manual_seed(0)
    plain = GatedKalmaNet(32, head_dim=16, num_heads=2)
    layer = GatedKalmaNet(32, head_dim=16, num_heads=2, solver="cg")
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(1, 100, 32)
    a, b = plain(x)[0], layer(x)[0]
    assert_close(a, b, 10 * chebyshev_bound(0.02, 30))
    assert not torch.equal(a, b)
