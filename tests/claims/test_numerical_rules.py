"""Claim: whatever the history, results and gradients are finite, and right where there is a right answer."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.maths.ridge import empty_below
from gka.ops.chunk import chunk_gka, fused_recurrent_gka
from problems import Problem, chunkwise, differentiate, make_problem, oracle
from tolerances import RELATIVE, assert_close

F32 = torch.float32


def with_(problem: Problem, **fields: Tensor | bool | None) -> Problem:
    return Problem(**{**vars(problem), **fields})


def differentiate_finite(problem: Problem, **settings):
    """Results and gradients, all of them finite."""
    results, grads = differentiate(chunkwise, problem, **settings)
    for name, x in [*zip(("o", "h", "u"), results, strict=True), *grads.items()]:
        assert torch.isfinite(x).all(), f"{name} holds NaN or infinity"
    return results, grads


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_history_solves_to_zero(op, backend):
    """All-zero keys: x_t = 0, so o_t = (1 - alpha_t) U_t^T q_t, and every gradient is finite."""
    base = make_problem(70, dtype=F32)
    problem = with_(base, k=torch.zeros_like(base.k), h0=torch.zeros(1, 2, 16, 16))
    (o, *_), grads = differentiate(chunkwise, problem, op=op, backend=backend)
    assert all(torch.isfinite(x).all() for x in (o, *grads.values()))
    assert problem.g is not None and problem.alpha is not None and problem.u0 is not None
    faded = problem.g.cumsum(1).exp().unsqueeze(-1)
    expected = (
        faded
        * (1 - problem.alpha).unsqueeze(-1)
        * torch.einsum("bthk,bhkv->bthv", problem.q, problem.u0)
    )
    assert_close(o, expected, RELATIVE[F32], "o")
    without_mix = with_(problem, alpha=None)
    assert (chunkwise(without_mix, op=op, backend=backend)[0] == 0).all()


@pytest.mark.parametrize("zero_keys_after", [False, True])
@pytest.mark.parametrize("decay", [-20.0, -100.0, -1000.0])
def test_strong_decay(decay, zero_keys_after):
    """g = -20, -100, -1000 at every token, or a key and then nothing: finite, and equal to float64."""
    base = make_problem(130, dtype=F32)
    assert base.g is not None
    k = base.k.clone()
    if zero_keys_after:
        k[:, 3:60] = 0
        k[:, 62:] = 0
    problem = with_(base, k=k, g=torch.full_like(base.g, decay))
    results, _ = differentiate_finite(problem)
    precise = chunkwise(problem.map(lambda x: x.double()), num_iter=30)
    # where the history is a key faded below float32's threshold, float64 still solves and float32 gives 0
    live = torch.ones(130, dtype=torch.bool)
    if zero_keys_after:
        live[3:60] = False
        live[62:] = False
    assert_close(results[0][:, live], precise[0][:, live], RELATIVE[F32], "o")
    for x, y in zip(results[1:], precise[1:], strict=True):
        assert_close(x, y, RELATIVE[F32])


@pytest.mark.parametrize("ridge_ratio", [0.005, 0.02])
@pytest.mark.parametrize("per_token", [-0.3, -1.0, -3.0, -10.0])
def test_history_of_h_fades_while_u_stays(per_token, ridge_ratio):
    """H fades to nothing under a full U, through every size of F on the way: p_t / F_t ~ 1/F_t^3 would
    overflow float32 well above the threshold of the empty history; nothing does."""
    base = make_problem(140, dims=(8, 8), decay="separate", dtype=F32)
    assert base.gk is not None
    k = base.k.clone()
    k[:, 3:] = 0
    problem = with_(base, k=k, gk=torch.full_like(base.gk, per_token), h0=torch.zeros(1, 2, 8, 8))
    differentiate_finite(problem, ridge_ratio=ridge_ratio)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 1e-20, 1e-30])
def test_keys_of_any_size(size):
    """Keys far below unit norm beside a state U of ordinary size: finite gradients at every size."""
    base = make_problem(70, dims=(8, 8), decay="absent", dtype=F32)
    problem = with_(base, k=base.k * size, h0=torch.zeros(1, 2, 8, 8))
    differentiate_finite(problem)


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
@pytest.mark.parametrize("size", [1e9, 1e10, 1e13, 1e15])
def test_keys_whose_fourth_power_overflows(size, solver, op):
    """|H|^2 ~ |k|^4 is beyond float32 from keys of norm 4e9 on, |H| is not: results and gradients are right,
    beside a head and a sequence of ordinary keys as well."""
    base = make_problem(70, (4, 2, 2), (8, 8), batch=2, dtype=F32)
    assert base.h0 is not None
    sizes = torch.ones(2, 1, 2, 1)
    sizes[0, 0, 0] = size
    h0 = base.h0 * sizes.square().repeat_interleave(2, 2).permute(0, 2, 1, 3)
    problem = with_(base, k=base.k * sizes, h0=h0)
    results, grads = differentiate_finite(problem, op=op, solver=solver)
    precise, precise_grads = differentiate(
        chunkwise, problem.map(lambda x: x.double()), op=op, solver=solver
    )
    for (name, x), y in zip(grads.items(), precise_grads.values(), strict=True):
        assert_close(x, y, RELATIVE[F32], f"d{name}")
    for x, y in zip(results, precise, strict=True):
        for b, head in ((0, 0), (1, 3)):  # each on its own scale
            some = (b, slice(None), head) if x.shape[1] == 70 else (b, head)
            assert_close(x[some], y[some], RELATIVE[F32])


def test_the_gradient_of_a_strong_decay_is_no_difference():
    """With g = -20 the gradient of g is e^-20 of that of k and v, and right to rounding all the same: no sum
    less its last term is in it."""
    base = make_problem(20, states=False, dtype=F32)
    assert base.g is not None
    problem = with_(base, g=torch.full_like(base.g, -20.0))
    _, grads = differentiate_finite(problem, num_iter=0)
    _, precise = differentiate(chunkwise, problem.map(lambda x: x.double()), num_iter=0)
    assert 0 < precise["g"].abs().max() < 1e-6
    assert_close(grads["g"], precise["g"], RELATIVE[F32], "dg")


@pytest.mark.parametrize("gate", [1.0, 1e-3, 1e-6])
def test_write_gate_at_its_floor_is_not_an_empty_history(gate):
    """With every beta at g, o is that with beta = 1: U and H scale alike (the layer's floor is 1e-6)."""
    base = make_problem(70, gates="", states=False, dtype=F32)
    problem = with_(base, beta=torch.full_like(base.q[..., 0], gate))
    (o, *_), _ = differentiate_finite(problem)
    assert_close(o, chunkwise(base)[0], 10 * RELATIVE[F32], "o")


def test_one_key_over_and_over():
    """One key repeated: H has rank one, o_t = v / (1 + a) for a unit key and one value; gradients exact."""
    key = normalize(torch.ones(16, dtype=torch.float64), dim=0)
    value = torch.arange(1.0, 5.0, dtype=torch.float64)
    problem = Problem(
        q=key.expand(1, 200, 2, 16), k=key.expand(1, 200, 2, 16), v=value.expand(1, 200, 2, 4)
    )
    (o, *_), grads = differentiate(chunkwise, problem, num_iter=120)
    assert_close(o, problem.v / 1.02, 1e-12, "o")
    _, expected = differentiate(oracle, problem)
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-9, f"d{name}")
    differentiate_finite(problem.map(lambda x: x.float()))


def test_a_hundred_thousand_tokens_of_one_key():
    """100 000 tokens of one key in float32: o_t = v / (1 + a) at every one of them, gradients finite."""
    length = 100_000
    key = normalize(torch.ones(4), dim=0)
    value = torch.tensor([1.0, -2.0])
    leaves = [key.expand(1, length, 1, 4), key.expand(1, length, 1, 4)]
    q, k = (x.clone().requires_grad_() for x in leaves)
    v = value.expand(1, length, 1, 2).clone().requires_grad_()
    o, state = chunk_gka(q, k, v, scale=1.0, output_final_state=True)
    assert state is not None
    worst = ((o - v / 1.02).norm(dim=-1) / value.norm()).max()
    assert worst < 1e-3  # num_iter = 30 leaves 3e-4
    assert_close(state[0][0, 0], length * torch.outer(key, key), 1e-6, "H")
    for grad in torch.autograd.grad(o.square().sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


def test_decays_are_differences_not_quotients():
    """After 30 tokens of g = -100, whose exponentials are all zero, the decays among the later tokens of
    the same chunk are as accurate as if those had never been: outputs, H and every gradient."""
    base = make_problem(60, states=False)
    g = base.g
    assert g is not None
    g = torch.cat([torch.full_like(g[:, :30], -100.0), 0.05 * g[:, 30:]], 1)
    problem = with_(base, g=g).map(lambda x: x.float())
    results, grads = differentiate_finite(problem)
    precise, precise_grads = differentiate(chunkwise, problem.map(lambda x: x.double()))
    for x, y in zip(results, precise, strict=True):
        assert_close(x, y, RELATIVE[F32])
    for name, grad in grads.items():
        assert_close(grad, precise_grads[name], 2 * RELATIVE[F32], f"d{name}")


def test_long_sums_of_decays_keep_their_differences():
    """A float32 sum of log decays near 3200 is rounded to 2e-4; the decays from it are accurate to 1e-6."""
    base = make_problem(64, gates="", states=False)
    assert base.g is not None
    g = torch.full_like(base.g, -0.01)
    g[:, :32] = -100.0
    problem = with_(base, g=g, k=base.k[:, :1].expand_as(base.k)).map(lambda x: x.float())
    h = chunkwise(problem)[1]
    exact = oracle(problem.map(lambda x: x.double()))[1]
    assert_close(h, exact, 1e-6, "H")


def test_faded_history_reads_the_same_until_it_is_empty():
    """Tied decay scales U and H alike, so a fading history reads unchanged down to the threshold, and is
    read as zero below it: never in between, never NaN."""
    base = make_problem(64, gates="", states=False, dtype=F32)
    k, g = base.k.clone(), torch.full((1, 64, 2), -1.0)
    k[:, 4:] = 0
    q = base.q[:, 3:4].expand_as(base.q)
    o, *_ = chunkwise(with_(base, q=q, k=k, g=g))
    fro = chunkwise(with_(base.tokens(0, 4), k=k[:, :4], g=g[:, :4]))[1].norm(dim=(-2, -1))
    size = fro.unsqueeze(1) * torch.exp(-torch.arange(-3.0, 61.0))[None, :, None]
    for n in range(4, 64):
        for head in range(2):
            ratio = size[0, n, head].item() / empty_below(F32)
            if ratio > 1.1:
                assert_close(o[0, n, head], o[0, 3, head], 1e-4, f"F = {ratio:.1e} thresholds")
            elif ratio < 0.9:
                assert (o[0, n, head] == 0).all()
    assert (o[0, -1] == 0).all()
