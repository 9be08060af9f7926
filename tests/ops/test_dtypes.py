"""Inputs of every dtype against the float64 oracle on the same (rounded) inputs."""

import pytest
import torch

from gka.ops.chunk import chunk_gka, fused_recurrent_gka
from problems import Problem, chunkwise, differentiate, make_problem, oracle
from tolerances import RELATIVE, assert_close, relative_error

LOW = [torch.float32, torch.float16, torch.bfloat16]


def rounded(dtype: torch.dtype, **options) -> Problem:
    """q, k, v rounded to a dtype; gates and states as a layer gives them, in float32."""
    problem = make_problem(130, (2, 1, 2), **options).map(lambda x: x.float())
    heads = {name: getattr(problem, name).to(dtype) for name in ("q", "k", "v")}
    return Problem(**{**vars(problem), **heads})


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("dtype", LOW)
def test_error_is_that_of_the_dtype(op, dtype):
    """Output and gradients come in their inputs' dtypes, states in float32; each within the table's
    tolerance of float64 (120 steps, so that nothing but rounding is left)."""
    problem = rounded(dtype)
    results, grads = differentiate(chunkwise, problem, op=op, num_iter=120)
    expected, expected_grads = differentiate(oracle, problem.map(lambda x: x.double()))
    assert [x.dtype for x in results] == [dtype, torch.float32, torch.float32]
    for x, y in zip(results, expected, strict=True):
        assert_close(x, y, RELATIVE[x.dtype])
    for name, grad in grads.items():
        assert grad.dtype == getattr(problem, name).dtype, name
        assert_close(grad, expected_grads[name], RELATIVE[dtype], f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accumulation_is_float32(dtype):
    """16-bit inputs cost the rounding of the output and no more: states are as accurate as in float32.

    256 equal bfloat16 terms stop a bfloat16 sum; 1000 tokens of nearly one key make H, U and F such sums.
    """
    base = rounded(dtype, gates="", states=False)
    k = base.k[:, :1].expand(1, 1000, 1, 16)
    v = base.v[:, :1].expand(1, 1000, 2, 16)
    q = base.q[:, :1].expand(1, 1000, 2, 16)
    problem = Problem(q=q, k=k, v=v)
    o, h, u = chunkwise(problem, num_iter=120)
    expected = chunkwise(problem.map(lambda x: x.double()), num_iter=120)
    assert_close(h, expected[1], 1e-6, "H")
    assert_close(u, expected[2], 1e-6, "U")
    # F sets lambda: a bias of F by b would scale this readout by about b a / (1 + a)
    assert_close(o, expected[0], torch.finfo(dtype).eps / 2, "o")


def test_frobenius_norm_is_not_biased_by_bfloat16():
    """F of bfloat16 keys is F of those keys: a query off the keys reads x = q / (a F), so its ridge shows."""
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(1, 300, 1, 8).abs(), dim=-1).bfloat16()
    keys[..., -1] = 0
    query = torch.zeros(1, 300, 1, 8, dtype=torch.bfloat16)
    query[..., -1] = 1
    _, h, _ = chunkwise(Problem(q=query, k=keys, v=keys))
    u0 = torch.eye(8).expand(1, 1, 8, 8).contiguous()
    state = (torch.zeros(1, 1, 8, 8), u0)
    o, _ = chunk_gka(query, keys, keys, initial_state=state, scale=1.0, num_iter=120)
    outer = keys.double().mT if keys.dim() == 2 else keys[0, :, 0].double()
    exact = (outer.T @ outer).norm()
    assert relative_error(h[0, 0].norm(), exact) < 1e-6
    assert (
        relative_error(1 / (0.02 * o[0, -1, 0, -1].double()), exact)
        < torch.finfo(torch.bfloat16).eps
    )


def test_gates_may_have_another_dtype():
    """Gates in bfloat16 or float64 beside float32 heads: gradients come back in the gates' dtypes."""
    problem = rounded(torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        gates = {n: getattr(problem, n).to(dtype) for n in ("g", "alpha", "beta")}
        mixed = Problem(**{**vars(problem), **gates})
        (o, *_), grads = differentiate(chunkwise, mixed)
        same, _ = differentiate(chunkwise, mixed.map(lambda x: x.float()))
        assert_close(o, same[0], RELATIVE[torch.float32])
        assert all(grads[n].dtype == dtype for n in gates)
