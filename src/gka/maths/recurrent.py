"""The map token by token without autograd, for decoding on devices without a kernel.

The states are updated in place: a call's own states, or places of a pool.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.readout import mix


@dataclass(frozen=True)
class States:
    """States of many sequences, updated in place.

    Attributes:
        h: H [P,H,K,K]; None where it is not formed.
        u: U [P,H,K,V], in the working precision, or bfloat16 if that is float32.
        indices: place of each sequence in the pool [B], -1 for none; None: sequence b has place b.
    """

    h: Tensor | None
    u: Tensor
    indices: Tensor | None = None

    def rows(self, batch: int) -> Iterator[tuple[slice, slice]]:
        """(sequences, their places): all at once, or one by one if they lie in a pool."""
        if self.indices is None:
            yield slice(0, batch), slice(0, batch)
            return
        for b, place in enumerate(self.indices.tolist()):
            if 0 <= place < self.u.shape[0]:
                yield slice(b, b + 1), slice(place, place + 1)


def recurrent_forward(tokens: Tokens, settings: Settings) -> Forward:
    """The map of `reference` with the state in place; same results as `chunk_forward`."""
    states, x = fresh_states(tokens, settings), fresh_x(tokens, settings)
    o = step_(tokens, settings, states, x=x)
    return Forward(o=o, x=x, h=states.h, u=states.u)


def fresh_states(tokens: Tokens, settings: Settings) -> States:
    """A call's own states, to be updated: copies of its initial states, or zeros."""
    batch, _, heads, dim = tokens.q.shape
    count = batch if tokens.cu_seqlens is None else tokens.cu_seqlens.shape[0] - 1

    def start(given: Tensor | None, width: int) -> Tensor:
        if given is not None:
            return given.clone(memory_format=torch.contiguous_format)
        return tokens.q.new_zeros(count, heads, dim, width, dtype=tokens.work_dtype)

    with_h = settings.num_iter > 0 or settings.with_h
    return States(start(tokens.h0, dim) if with_h else None, start(tokens.u0, tokens.v.shape[-1]))


def fresh_x(tokens: Tokens, settings: Settings) -> Tensor | None:
    """Memory for the solutions [B,T,H,K]; None without a solve."""
    shape = tokens.q.shape
    return tokens.q.new_empty(shape, dtype=tokens.work_dtype) if settings.num_iter > 0 else None


def step_(
    tokens: Tokens, settings: Settings, states: States, commit: bool = True, x: Tensor | None = None
) -> Tensor:
    """o [B,T,H,V] of a few tokens after `states`, which are updated in place if `commit`.

    Sequences without a place in the pool give zeros. x [B,T,H,K], if given, receives the solutions.
    """
    q, bounds = tokens.q, _bounds(tokens)
    o = q.new_zeros(*q.shape[:3], tokens.v.shape[-1])
    if x is not None and states.indices is not None:
        x.zero_()
    for rows, places in states.rows(q.shape[0]) if bounds is None else _packed(bounds, states):
        part = _slice(tokens, rows, bounds)
        out = None if x is None else _cut(x, rows, bounds)
        _cut(o, rows, bounds).copy_(_sequence(part, settings, states, places, commit, out))
    return o


def advance_(tokens: Tokens, settings: Settings, states: States, counts: Tensor) -> None:
    """Decay and update of the first counts[b] tokens of each sequence; no solve, no readout."""
    limits = counts.tolist()
    everything = replace(states, indices=torch.arange(len(limits), device="cpu"))
    for rows, places in (states if states.indices is not None else everything).rows(len(limits)):
        part = _slice(tokens, rows, None)
        h, u = _working(states, places, part.work_dtype)
        for token in itertools.islice(_updates(part, settings, h, u), max(limits[rows.start], 0)):
            del token
        _commit(states, places, h, u)


def _bounds(tokens: Tokens) -> list[int] | None:
    known = tokens.cu_seqlens if tokens.cu_seqlens_cpu is None else tokens.cu_seqlens_cpu
    return None if known is None else known.tolist()


def _packed(bounds: list[int], states: States) -> Iterator[tuple[slice, slice]]:
    """Packed sequences one by one, with their places."""
    one_by_one = replace(states, indices=torch.arange(len(bounds) - 1, device="cpu"))
    return one_by_one.rows(len(bounds) - 1)


def _cut(x: Tensor, rows: slice, bounds: list[int] | None) -> Tensor:
    """The sequences `rows` of [B,T,...]; of packed ones, a single sequence as a batch of one."""
    return x[rows] if bounds is None else x[:, bounds[rows.start] : bounds[rows.start + 1]]


def _slice(tokens: Tokens, rows: slice, bounds: list[int] | None) -> Tokens:
    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else _cut(x, rows, bounds)

    t = tokens
    q, k, v = (_cut(x, rows, bounds) for x in (t.q, t.k, t.v))
    return Tokens(q, k, v, part(t.g), part(t.gk), part(t.alpha), part(t.beta), None, None, None)


def _working(
    states: States, places: slice, dtype: torch.dtype, commit: bool = True
) -> tuple[Tensor | None, Tensor]:
    """H and U to update: the states' own memory if it may be changed and has the working dtype."""
    h = None if states.h is None else states.h[places]
    u = states.u[places]
    if not commit:
        return None if h is None else h.clone(), u.to(dtype, copy=True)
    return h, u.to(dtype)


def _commit(states: States, places: slice, h: Tensor | None, u: Tensor) -> None:
    """Round U into its place if it was widened; everything else is already in place."""
    if u.dtype != states.u.dtype:
        states.u[places].copy_(u)


def _updates(
    tokens: Tokens, settings: Settings, h: Tensor | None, u: Tensor
) -> Iterator[tuple[int, Tensor | None]]:
    """Yield (t, H_t) after h and u have decayed and received token t, in place."""
    dtype, heads = tokens.work_dtype, tokens.q.shape[2]
    gamma_u = None if tokens.g is None else tokens.g.to(dtype).exp()[..., None, None]
    gamma_h = gamma_u
    if not settings.tied:
        gamma_h = None if tokens.gk is None else tokens.gk.to(dtype).exp()[..., None, None]
    beta = None if tokens.beta is None else tokens.beta.to(dtype).unsqueeze(-1)

    def head_by_head(x: Tensor, t: int) -> Tensor:
        """Token t of shared heads, times the write gate, for every query head: [B,H,D]."""
        shared = x[:, t].to(dtype).unsqueeze(2)
        each = shared.expand(-1, -1, heads // x.shape[2], -1).flatten(1, 2)
        return each if beta is None else each * beta[:, t]

    for t in range(tokens.q.shape[1]):
        k, v = head_by_head(tokens.k, t), head_by_head(tokens.v, t)
        _update(u, None if gamma_u is None else gamma_u[:, t], k, v)
        if h is not None:
            _update(h, None if gamma_h is None else gamma_h[:, t], k, k)
        yield t, h


def _sequence(
    tokens: Tokens,
    settings: Settings,
    states: States,
    places: slice,
    commit: bool,
    x: Tensor | None,
) -> Tensor:
    """o, in the working precision, of equally long sequences [B,T,...] at consecutive places."""
    dtype = tokens.work_dtype
    h, u = _working(states, places, dtype, commit)
    q = tokens.q.to(dtype)
    o = q.new_empty(*q.shape[:3], u.shape[-1])
    alpha = None if tokens.alpha is None else tokens.alpha.to(dtype)
    solver = settings.make_solver()
    for t, h_t in _updates(tokens, settings, h, u):
        z = q[:, t]
        if h_t is not None and settings.num_iter > 0:
            x_t = solver.solve_state(h_t, z)
            z = mix(z, x_t, None if alpha is None else alpha[:, t])
            if x is not None:
                x[:, t] = x_t
        o[:, t] = (z.unsqueeze(-2) @ u).squeeze(-2)
    if commit:
        _commit(states, places, h, u)
    return o.mul_(settings.scale)


def _update(state: Tensor, gamma: Tensor | None, k: Tensor, v: Tensor) -> None:
    """S <- gamma S + k v^T in place."""
    if gamma is not None:
        state.mul_(gamma)
    state.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
