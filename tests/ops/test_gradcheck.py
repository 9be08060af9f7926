"""Finite differences know nothing of derivations."""

import pytest
import torch

from gka.ops.chunk import chunk_gka, fused_recurrent_gka
from problems import Problem, make_problem


@pytest.mark.parametrize(
    ("op", "decay", "packed"),
    [
        (chunk_gka, "tied", False),
        (chunk_gka, "separate", True),
        (chunk_gka, "absent", False),
        (fused_recurrent_gka, "separate", False),
    ],
)
def test_gradcheck(op, decay, packed):
    """All gradients in float64 match finite differences of the outputs and both final states.

    30 steps at a = 0.5 leave 4e-18 of truncation, so the map is the exact one; h0 = root + root^T
    moves among symmetric matrices only.
    """
    problem = make_problem(4, (2, 1, 2), (2, 2), decay=decay, lengths=[1, 0, 3] if packed else None)
    if decay == "absent":  # also without the gates
        problem = Problem(**{**vars(problem), "alpha": None, "beta": None})
    assert problem.h0 is not None
    eye = torch.eye(2, dtype=torch.float64)
    start = Problem(**{**vars(problem), "h0": problem.h0 / 2 + eye}).leaves()
    names = list(start.tensors())
    chunk = {} if op is fused_recurrent_gka else {"chunk_size": 2}

    def run(*inputs):
        p = Problem(**{**vars(start), **dict(zip(names, inputs, strict=True))})
        assert p.h0 is not None and p.u0 is not None
        o, state = op(
            p.q, p.k, p.v, p.g, p.g if p.tied else p.gk, p.alpha, num_iter=30, ridge_ratio=0.5, beta=p.beta,
            initial_state=(p.h0 + p.h0.mT, p.u0), output_final_state=True,
            cu_seqlens=p.cu_seqlens, **chunk,
        )  # fmt: skip
        assert state is not None
        return o, *state

    assert torch.autograd.gradcheck(run, tuple(start.tensors().values()), fast_mode=False)
