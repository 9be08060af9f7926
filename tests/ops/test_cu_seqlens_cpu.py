"""With a CPU copy of cu_seqlens the device's own is not read, so nothing waits for the device."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gka.maths.solvers import SolverName
from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from gka.ops.delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from problems import chunkwise, differentiate, make_problem

LENGTHS = [3, 0, 70, 1]


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_only_the_copy_is_read(op, backend):
    """Output, states and all gradients follow the copy, even where cu_seqlens itself holds nothing of use."""
    problem = make_problem(0, (4, 2, 1), (8, 5), decay="separate", lengths=LENGTHS)
    assert problem.cu_seqlens is not None
    copy = problem.cu_seqlens.clone()
    options = {"op": op, "backend": backend, "num_iter": 5}
    results, grads = differentiate(chunkwise, problem, **options)
    problem.cu_seqlens.zero_()
    found, found_grads = differentiate(chunkwise, problem, cu_seqlens_cpu=copy, **options)
    for x, y in zip([*found, *found_grads.values()], [*results, *grads.values()], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "op", [chunk_simple_gla, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]
)
def test_other_ops_read_only_the_copy(op):
    """The ops of the other memories take the copy too, and refuse one that is not of this cu_seqlens."""
    p = make_problem(0, lengths=LENGTHS)
    assert p.cu_seqlens is not None
    copy = p.cu_seqlens.clone()
    expected, state = op(p.q, p.k, p.v, p.g, cu_seqlens=copy, output_final_state=True)
    options = {"cu_seqlens": torch.zeros_like(copy), "output_final_state": True}
    found, same = op(p.q, p.k, p.v, p.g, cu_seqlens_cpu=copy, **options)
    assert torch.equal(found, expected) and torch.equal(state, same)
    with pytest.raises(ValueError, match="cu_seqlens_cpu must have cu_seqlens' shape"):
        op(p.q, p.k, p.v, p.g, cu_seqlens_cpu=copy[1:], **options)


def test_it_compiles_and_may_be_int32():
    """torch.compile(fullgraph=True) passes the copy through, forward and backward."""
    problem = make_problem(0, lengths=LENGTHS, dtype=torch.float32)
    assert problem.cu_seqlens is not None
    copy = problem.cu_seqlens.int()

    def loss(cu_seqlens, copy, q, k, v):
        o, state = chunk_gka(
            q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_cpu=copy, output_final_state=True
        )
        assert state is not None
        return o.square().sum() + state[0].sum()

    inputs = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    expected = torch.autograd.grad(loss(problem.cu_seqlens, None, *inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for bounds in (torch.zeros_like(copy), copy):  # the tensor itself may be its copy
        found = torch.autograd.grad(compiled(bounds, copy, *inputs), inputs)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_the_default_device_moves_nothing(op, lengths):
    """Under a default device of meta results, states and gradients of tensors on the CPU keep their bits."""
    problem = make_problem(70, (4, 2, 1), (8, 5), lengths=lengths)
    for solver in ("chebyshev", "adaptive", "cg"):

        def everything(solver: SolverName = solver) -> list[torch.Tensor]:
            leaves = problem.leaves()
            results = chunkwise(leaves, op=op, num_iter=5, solver=solver)
            weights = [x.detach() for x in results]
            tensors = list(leaves.tensors().values())
            return [*weights, *torch.autograd.grad(results, tensors, weights)]

        expected = everything()
        with torch.device("meta"):
            found = everything()
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    "op", [chunk_simple_gla, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]
)
def test_the_default_device_moves_nothing_of_other_ops(op):
    """So it is for the ops of the other memories, packed."""
    p = make_problem(0, lengths=LENGTHS)
    options = {"cu_seqlens": p.cu_seqlens, "output_final_state": True}
    expected, state = op(p.q, p.k, p.v, p.g, **options)
    with torch.device("meta"):
        found, same = op(p.q, p.k, p.v, p.g, **options)
    assert torch.equal(found, expected) and torch.equal(state, same)


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_a_profile_names_the_regions(op):
    """A profile of a training step shows gka.forward and gka.backward, once for each call."""
    p = make_problem(20, dtype=torch.float32)
    q = p.q.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        op(q, p.k, p.v)[0].sum().backward()
    counts = {event.key: event.count for event in trace.key_averages()}
    assert counts.get("gka.forward") == 1 and counts.get("gka.backward") == 1
