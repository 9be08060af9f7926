"""The float64 answer to a call: the reference's arithmetic, token by token, with the library's derivative.

`gka.maths.reference` takes one solve a token. Its states are computed here in the same order and solved
together, which is the same arithmetic in a hundredth of the time (test_fuzz.py compares the two). Two
things are the library's own definitions, which autograd through the iteration would not give:
the derivative of the solve is the exact one at the computed solutions (docs/maths.md, section 8), and
a history is empty below the threshold of the precision that the call computes in.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from gka.maths import reference
from gka.maths.readout import mix
from gka.maths.ridge import empty_below
from gka.maths.solvers.chebyshev import chebyshev_solve
from problems import Problem

Answer = dict[str, Tensor]


class _Rounded(torch.autograd.Function):
    """x with every number changed by a relative `step`, up or down, and its gradient likewise."""

    @staticmethod
    def forward(ctx, x: Tensor, rounding: "Rounding") -> Tensor:
        ctx.rounding = rounding
        return rounding.change(x)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.rounding.change(grads[0]), None


class Rounding:
    """What a precision does to every intermediate number, in both passes, at a step of one's choice.

    A number that is not zero is moved by step (|x| + tiny), tiny being the precision's smallest normal
    number: below it numbers are further apart. Two answers that differ by it alone show how well
    conditioned a call is, cancellation inside the derivative included, where two answers to slightly
    different inputs may agree by invariance.
    """

    def __init__(self, step: float, seed: int, tiny: float = 0.0) -> None:
        self.step, self.tiny = step, tiny
        self.generator = torch.Generator().manual_seed(seed)

    def change(self, x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=self.generator).double() * 2 - 1
        size = (x.abs() + self.tiny).where(x.isfinite() & (x != 0), torch.zeros_like(x))
        return x + (self.step * sign) * size

    def __call__(self, x: Tensor) -> Tensor:
        return _Rounded.apply(x, self) if self.step > 0 else x

    def exp(self, log_decay: Tensor) -> Tensor:
        """A decay, moved in its value and its derivative alike; one of zero stays zero."""
        if self.step == 0:
            return log_decay.exp()
        gamma = log_decay.detach().exp()
        moved = gamma + (self.change(gamma) - gamma).abs()
        shift = (moved.log() - gamma.log()).where(gamma > 0, torch.zeros_like(gamma))
        return (log_decay + shift).exp()


EXACT = Rounding(0.0, 0)


class _Adjoint(torch.autograd.Function):
    """Zero, with p_r(A) as the derivative by its argument."""

    @staticmethod
    def forward(ctx, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.solve(grads[0]), None


@dataclass(frozen=True)
class Solve:
    """x_r of `chebyshev_solve`, with roundings of F_t and of every step's product with H_t.

    F_t is a single number, so that its rounding changes a whole spectrum, and at the ends of the spectrum
    p_r changes by r^2 times as much: rounding H_t, whose K^2 numbers average, does not show that.

    Attributes:
        exact_derivative: that of A x = q at x_r, solved by the same p_r(A); else autograd's own.
    """

    exact_derivative: bool
    rounded: Rounding

    def __call__(
        self, apply_h: Callable[[Tensor], Tensor], q: Tensor, fro: Tensor, ridge_ratio: float, num_iter: int
    ) -> Tensor:  # fmt: skip
        rounded, fro = self.rounded, self.rounded(fro)

        def product(d: Tensor) -> Tensor:
            return rounded(apply_h(rounded(d)))

        def solve(b: Tensor) -> Tensor:
            with torch.no_grad():
                return chebyshev_solve(product, b, fro.detach(), ridge_ratio, num_iter)

        if not self.exact_derivative:
            return chebyshev_solve(product, q, fro, ridge_ratio, num_iter)
        x = solve(q.detach())
        residual = q - apply_h(x) - (ridge_ratio * fro).unsqueeze(-1) * x
        return x + _Adjoint.apply(residual, solve)


class Threshold:
    """`split_empty` with the threshold of another precision; notes whether anything came near it."""

    def __init__(self, work: torch.dtype) -> None:
        self.floor, self.near = empty_below(work), False

    def split_empty(self, fro_squared: Tensor) -> tuple[Tensor, Tensor]:
        empty = fro_squared < self.floor**2
        border = (fro_squared > (self.floor / 4) ** 2) & (fro_squared < (4 * self.floor) ** 2)
        self.near = self.near or bool(border.any())
        return fro_squared.masked_fill(empty, 1.0).sqrt(), empty


@contextmanager
def as_the_library(
    work: torch.dtype, exact_derivative: bool, rounded: Rounding = EXACT
) -> Iterator[Threshold]:
    """The reference with the threshold of `work`, and with the library's derivative or autograd's own."""
    threshold = Threshold(work)
    solve = Solve(exact_derivative, rounded)
    with (
        mock.patch.object(reference, "chebyshev_solve", solve),
        mock.patch.object(reference, "split_empty", threshold.split_empty),
    ):
        yield threshold


def moments(
    k: Tensor, v: Tensor, log_decay: Tensor | None, start: Tensor, rounded: Rounding
) -> tuple[Tensor, Tensor]:
    """S_t of every token [B,T,H,K,V], and the last: S_t = exp(g_t) S_{t-1} + k_t v_t^T."""
    state, every, k, v = start, [], rounded(k), rounded(v)
    for t in range(k.shape[1]):
        if log_decay is not None:
            state = rounded(rounded.exp(log_decay[:, t])[..., None, None] * state)
        state = rounded(state + rounded(k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)))
        every.append(state)
    stacked = torch.stack(every, 1) if every else start.new_zeros(len(k), 0, *start.shape[1:])
    return stacked, state


def gka_sequence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gk: Tensor | None, alpha: Tensor | None,
    beta: Tensor | None, state: tuple[Tensor, Tensor], rounded: Rounding = EXACT, *, scale: float,
    ridge_ratio: float, num_iter: int,
) -> Answer:  # fmt: skip
    """`reference_sequence`, all its solves at once."""
    if beta is not None:
        k, v = rounded(beta.unsqueeze(-1) * k), rounded(beta.unsqueeze(-1) * v)
    h, h_final = moments(k, k, gk, state[0], rounded)
    u, u_final = moments(k, v, g, state[1], rounded)
    x = q
    if num_iter > 0 and q.numel() > 0:
        x = rounded(reference.solve_ridge(rounded(h), rounded(q), ridge_ratio, num_iter))
    z = rounded(mix(rounded(q), x, alpha)) if num_iter > 0 else q
    o = (z.unsqueeze(-2) @ rounded(u)).squeeze(-2)
    return {"o": rounded(scale * o), "h": h_final, "u": u_final}


def delta_sequence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gk: Tensor | None, alpha: Tensor | None,
    beta: Tensor | None, state: tuple[Tensor, Tensor], rounded: Rounding = EXACT, *, scale: float,
    chunk_size: int | None = None,
) -> Answer:  # fmt: skip
    """`delta_rule_sequence`; `chunk_size`: with the roundings of the form by chunks.

    That form adds up gamma S_[c] and all k_j u_j of a chunk. Where a later write takes an earlier one back,
    the sum keeps the rounding of both (`late`), which token by token goes with the earlier one.
    """
    s, outputs = state[1], []
    late = torch.zeros_like(s)
    for t in range(q.shape[1]):
        if chunk_size is not None and t % chunk_size == 0:
            s = s + late
            late = rounded(s) - s
        if g is not None:
            gamma = rounded.exp(g[:, t])[..., None, None]
            s, late = rounded(s * gamma), late * gamma
        k_t = rounded(k[:, t]).unsqueeze(-1)
        u_t = rounded(v[:, t].unsqueeze(-2) - rounded(k_t.mT @ s))
        if beta is not None:
            u_t = rounded(u_t * beta[:, t][..., None, None])
        write = rounded(k_t * u_t)
        s = rounded(s + write)
        if chunk_size is not None:
            late = late + (rounded(write) - write)
        outputs.append(rounded(scale * (q[:, t].unsqueeze(-2) @ (s + late)).squeeze(-2)))
    return {"o": torch.stack(outputs, 1) if outputs else torch.zeros_like(v), "u": s + late}


def answer(
    problem: Problem, sequence: Callable[..., Answer], rounded: Rounding = EXACT, **settings: float
) -> Answer:
    """o and final states of all sequences of a float64 problem, packed ones one by one."""
    p = problem
    heads = p.q.shape[2]
    bounds = None if p.cu_seqlens is None else p.cu_seqlens.tolist()
    sequences = p.q.shape[0] if bounds is None else len(bounds) - 1
    q, k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (p.q, p.k, p.v))
    inputs = (q, k, v, p.g, p.g if p.tied else p.gk, p.alpha, p.beta)
    h0, u0 = (
        q.new_zeros(sequences, heads, q.shape[-1], width) if x is None else x
        for x, width in ((p.h0, q.shape[-1]), (p.u0, v.shape[-1]))
    )
    if bounds is None:
        return sequence(*inputs, (h0, u0), rounded, **settings)
    parts = []
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        cut = (None if x is None else x[:, a:b] for x in inputs)
        parts.append(sequence(*cut, (h0[n : n + 1], u0[n : n + 1]), rounded, **settings))
    return {name: torch.cat([x[name] for x in parts], int(name == "o")) for name in parts[0]}
