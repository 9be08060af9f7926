"""What is kept for the backward pass."""

import pytest
import torch

from gka.ops.chunk import fused_recurrent_gka
from problems import Problem, chunkwise, make_problem


def saved_bytes(problem: Problem, **settings) -> int:
    """Bytes of the distinct storages that one forward pass keeps for its backward pass."""
    storages: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        results = chunkwise(problem.leaves(), **settings)
    assert results[0].requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("settings", [{}, {"op": fused_recurrent_gka}])
@pytest.mark.parametrize("lengths", [None, [100, 0, 156]])
def test_saved_for_backward_are_the_inputs_and_x(settings, lengths):
    """The inputs and the solutions x [B,T,H,K]: nothing else, whatever num_iter is, so O(T K)."""
    problem = make_problem(256, lengths=lengths, dtype=torch.float32)
    inputs = sum(x.nbytes for x in problem.tensors().values())
    inputs += 0 if problem.cu_seqlens is None else problem.cu_seqlens.nbytes
    for num_iter in (1, 30, 120):
        assert saved_bytes(problem, num_iter=num_iter, **settings) == inputs + problem.q.nbytes
    assert saved_bytes(problem, num_iter=0, **settings) == inputs


def test_shared_heads_are_saved_once():
    """Grouped heads: k and v are kept as given, never repeated to the heads of q."""
    problem = make_problem(64, (8, 1, 2), states=False, dtype=torch.bfloat16)
    inputs = sum(x.nbytes for x in problem.tensors().values())
    assert saved_bytes(problem) == inputs + 2 * problem.q.nbytes  # x is float32
