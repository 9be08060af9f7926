"""Memory at work: the largest sum of live tensors during a pass, counted operation by operation."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gka.maths.adjoint import chunk_backward
from gka.maths.chunked import Settings, Tokens, chunk_forward
from problems import make_problem


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {
            x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage not in self.known and storage not in old:
                    self.known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def release(self, size: int) -> None:
        self.live -= size


def peaks(length: int, num_iter: int) -> tuple[int, int]:
    """Peak bytes of the forward pass and of the backward pass."""
    p = make_problem(length, (2, 1, 2), (32, 32), dtype=torch.float32)
    tokens = Tokens(p.q, p.k, p.v, p.g, None, p.alpha, p.beta, p.h0, p.u0, None)
    settings = Settings(1.0, 0.02, num_iter, 64, True, True)
    with Peak() as forward:
        out = chunk_forward(tokens, settings)
    do = torch.ones_like(out.o)
    with Peak() as backward:
        chunk_backward(tokens, out.x, do, None, None, settings)
    return forward.peak, backward.peak


@pytest.mark.parametrize("which", [0, 1])
def test_peak_does_not_depend_on_the_number_of_steps(which):
    """The iterates are never kept: 60 steps need what 2 do, forward and backward."""
    assert peaks(512, 60)[which] == peaks(512, 2)[which] > 0


@pytest.mark.parametrize("which", [0, 1])
def test_peak_is_linear_in_the_length(which):
    """A constant plus so much a token, and a token costs a few vectors and its share of a chunk's state."""
    small, middle, large = (peaks(length, 2)[which] for length in (4096, 6144, 8192))
    assert large - middle == pytest.approx(middle - small, rel=0.02)
    per_token = (large - middle) / 2048 / 4 / 2  # float32 numbers a head
    assert per_token < 32 * (32 / 64 * 3 + 14)  # three [K,K] states a chunk, fourteen vectors
