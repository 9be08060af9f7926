"""The plain op whose derivatives `gradients` compares with the library's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gka.experiments.numerics import relative, tokens
from gka.experiments.reproduce import gradients
from gka.experiments.reproduce.differentiation import (
    chebyshev_steps,
    conjugate_gradient_steps,
    implicitly,
    plain_gka,
)
from gka.ops import chunk_gka

Op = Callable[..., Any]


def results(op: Op) -> list[Tensor]:
    """Output, and gradients of q, k, v and alpha, in float64 over two chunks."""
    inputs = [x.requires_grad_() for x in tokens(128, 2, 8)[:5]]
    q, k, v, g, alpha = inputs
    o, _ = op(q, k, v, g, g, alpha)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    return [o, *torch.autograd.grad((o * do).sum(), (q, k, v, alpha))]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert max(relative(x, y) for x, y in zip(found, wanted, strict=True)) < tolerance


def test_the_plain_op_is_the_librarys() -> None:
    """Implicitly differentiated Chebyshev steps: outputs and gradients equal `chunk_gka`'s."""
    plain = results(partial(plain_gka, solve=implicitly(chebyshev_steps)))
    close(plain, results(partial(chunk_gka, backend="torch")), 1e-12)


def test_autograd_through_the_steps_is_that_of_the_reference() -> None:
    """The derivative of the truncated iteration itself, token by token."""
    plain = results(partial(plain_gka, solve=chebyshev_steps))
    close(plain, results(partial(chunk_gka, backend="reference")), 1e-12)


def test_conjugate_gradients_reach_the_exact_gradient() -> None:
    """Thirty steps on systems of 8 dimensions; a guard in the denominators spoils them."""
    exact = results(partial(chunk_gka, num_iter=120, backend="torch"))
    close(results(partial(plain_gka, solve=implicitly(conjugate_gradient_steps))), exact, 1e-9)
    guarded = results(
        partial(plain_gka, solve=implicitly(partial(conjugate_gradient_steps, guard=1e-3)))
    )
    assert relative(guarded[1], exact[1]) > 1e-3


def test_errors_are_against_float64_on_the_same_weights() -> None:
    """The exact solver in float32 differs from itself in float64 by rounding alone, and from itself by 0."""
    size = gradients.Size(32, 1, 8, 20, (1,), (-0.05,))
    found = gradients.measure(size, 1, -0.05, "float32", 0, "cpu")["errors"]
    assert 0 < found["exact"]["exact"] < 1e-5 and found["exact"]["same precision"] == 0
    assert found["Chebyshev"]["exact"] < 1e-2
