"""The map token by token without autograd: what decoding runs on a device without its own kernel."""

import itertools

import torch
from torch import Tensor

from gka.maths.chebyshev import chebyshev_solve_
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.readout import mix
from gka.maths.ridge import split_empty
from gka.maths.system import System


def recurrent_forward(tokens: Tokens, settings: Settings) -> Forward:
    """The map of `reference` with the state in place; same results as `chunk_forward`."""
    if tokens.cu_seqlens is None:
        return _sequence(tokens, settings)
    known = tokens.cu_seqlens if tokens.cu_seqlens_cpu is None else tokens.cu_seqlens_cpu
    bounds = known.tolist()
    parts = [
        _sequence(_slice(tokens, n, begin, end), settings)
        for n, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]
    x = None if settings.num_iter == 0 else torch.cat([p.x for p in parts if p.x is not None], 1)
    h = [p.h for p in parts if p.h is not None]
    return Forward(
        o=torch.cat([p.o for p in parts], 1),
        x=x,
        h=torch.cat(h) if h else None,
        u=torch.cat([p.u for p in parts]),
    )


def _slice(tokens: Tokens, n: int, begin: int, end: int) -> Tokens:
    """Sequence n of packed tokens, as a batch of one."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, begin:end]

    t = tokens
    return Tokens(
        q=t.q[:, begin:end],
        k=t.k[:, begin:end],
        v=t.v[:, begin:end],
        g=part(t.g),
        gk=part(t.gk),
        alpha=part(t.alpha),
        beta=part(t.beta),
        h0=None if t.h0 is None else t.h0[n : n + 1],
        u0=None if t.u0 is None else t.u0[n : n + 1],
        cu_seqlens=None,
    )


def _sequence(tokens: Tokens, settings: Settings) -> Forward:
    """Equally long sequences [B,T,...]."""
    dtype = tokens.work_dtype
    batch, length, heads, head_dim = tokens.q.shape
    with_h = settings.num_iter > 0 or settings.with_h
    q = tokens.q.to(dtype)
    u = _start(tokens.u0, q.new_zeros(batch, heads, head_dim, tokens.v.shape[-1]))
    h = _start(tokens.h0, q.new_zeros(batch, heads, head_dim, head_dim)) if with_h else None
    x = torch.empty_like(q) if settings.num_iter > 0 else None
    o = q.new_empty(batch, length, heads, tokens.v.shape[-1])
    gamma_u = None if tokens.g is None else tokens.g.to(dtype).exp()[..., None, None]
    gamma_h = gamma_u
    if not settings.tied:
        gamma_h = None if tokens.gk is None else tokens.gk.to(dtype).exp()[..., None, None]
    k, v = (y.to(dtype).repeat_interleave(heads // y.shape[2], 2) for y in (tokens.k, tokens.v))
    if tokens.beta is not None:
        beta = tokens.beta.to(dtype).unsqueeze(-1)
        k, v = beta * k, beta * v
    alpha = None if tokens.alpha is None else tokens.alpha.to(dtype)
    for t in range(length):
        k_t, z_t = k[:, t], q[:, t]
        _update(u, None if gamma_u is None else gamma_u[:, t], k_t, v[:, t])
        if h is not None:
            _update(h, None if gamma_h is None else gamma_h[:, t], k_t, k_t)
        if h is not None and x is not None:
            x[:, t] = _solve(h, q[:, t], settings)
            z_t = mix(q[:, t], x[:, t], None if alpha is None else alpha[:, t])
        o[:, t] = (z_t.unsqueeze(-2) @ u).squeeze(-2)
    return Forward(o=o.mul_(settings.scale).to(tokens.q.dtype), x=x, h=h, u=u)


def _start(given: Tensor | None, zeros: Tensor) -> Tensor:
    return zeros if given is None else zeros.copy_(given)


def _update(state: Tensor, gamma: Tensor | None, k: Tensor, v: Tensor) -> None:
    """S <- gamma S + k v^T in place."""
    if gamma is not None:
        state.mul_(gamma)
    state.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))


def _solve(h: Tensor, q: Tensor, settings: Settings) -> Tensor:
    if settings.solver == "adaptive":
        system = System.of_state(h)
        x = system.solve(q.unsqueeze(-2), settings.ridge_ratio, settings.num_iter, settings.solver)
        return x.squeeze(-2)
    fro, empty = split_empty(h.square().sum((-2, -1)))
    q = q.masked_fill(empty.unsqueeze(-1), 0.0)

    def apply(d: Tensor) -> Tensor:
        return (h @ d.unsqueeze(-1)).squeeze(-1)

    return chebyshev_solve_(apply, q, fro, settings.ridge_ratio, settings.num_iter)
