"""The whole map chunk by chunk (paper: section 4.2.1): what `reference` computes, C tokens at a time.

Stages, in the order of the data: cut into chunks, moments at the chunk starts (a scan over chunks),
then for all chunks at once ridge, solve, mix and readout.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gka.maths.layout import ChunkLayout, chunk_layout
from gka.maths.moments import Decay, chunk_moments, scan
from gka.maths.nonfinite import put_back, take_out
from gka.maths.readout import mix, readout
from gka.maths.ridge import System
from gka.maths.solvers import SOLVERS, Solver, SolverName, make_solver

# Elements of the [C, K] arrays of chunks that are processed together. The solve rereads a few such arrays,
# which should stay in a CPU's cache; elsewhere the limit only bounds scratch memory.
BLOCK_ELEMENTS = {"cpu": 1 << 17}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Settings:
    """The map's parameters.

    Attributes:
        scale: factor of the readout.
        ridge_ratio: a in lambda_t = a F_t.
        num_iter: Chebyshev steps r; 0: no ridge (x_t = q_t).
        chunk_size: C.
        tied: whether H decays with g; gk is None then.
        with_h: whether to form H even if no solve needs it (for its final state).
        solver: "chebyshev" takes r steps for all tokens; "adaptive" and "cg" take fewer within the same
            error bound.
        keep_states: whether a GPU's forward pass keeps the states at chunk starts for the backward pass.
    """

    scale: float
    ridge_ratio: float
    num_iter: int
    chunk_size: int
    tied: bool
    with_h: bool
    solver: SolverName = "chebyshev"
    keep_states: bool = False

    def make_solver(self) -> Solver:
        """The solver with this a and r."""
        return make_solver(self.solver, self.ridge_ratio, self.num_iter)

    @property
    def adaptive(self) -> bool:
        """Whether the number of steps differs by chunk and head."""
        return SOLVERS[self.solver].adaptive


class Tokens(NamedTuple):
    """The inputs: q [B,T,H,K], k [B,T,Hk,K], v [B,T,Hv,V], gates [B,T,H] or None, states or None.

    cu_seqlens [N+1] holds the bounds of packed sequences. Its CPU copy saves a read from the device.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    h0: Tensor | None
    u0: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Heads, gates and states: all but `bounds`."""
        return self[:-2]

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """cu_seqlens and its copy on the CPU."""
        return self[-2:]

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Chunks:
    """The inputs cut into chunks, heads before tokens, in the working precision, and their moments."""

    def __init__(self, tokens: Tokens, settings: Settings) -> None:
        batch, length, self.heads, self.head_dim = tokens.q.shape
        self.tokens, self.settings = tokens, settings
        self.layout: ChunkLayout = chunk_layout(
            batch, length, settings.chunk_size, tokens.cu_seqlens, tokens.cu_seqlens_cpu
        )
        self.q = self.cut(tokens.q)
        self.k = self.cut(tokens.k)
        self.v = self.cut(tokens.v)
        self.alpha = None if tokens.alpha is None else self.cut(tokens.alpha)
        self.beta = None if tokens.beta is None else self.cut(tokens.beta)
        self.decay_u = Decay.of(None if tokens.g is None else self.cut(tokens.g), self.q)
        if settings.tied:
            self.decay_h = self.decay_u
        else:
            self.decay_h = Decay.of(None if tokens.gk is None else self.cut(tokens.gk), self.q)

    def cut(self, x: Tensor) -> Tensor:
        """[B,T,H,...] -> [M,H,C,...], contiguous."""
        return self.layout.cut(x.to(self.tokens.work_dtype)).transpose(1, 2).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[M,H,C,...] -> [B,T,H,...]."""
        return self.layout.join(x.transpose(1, 2))

    def beta_squared(self, decay: Decay) -> Tensor:
        """beta_j^2 [M,H,C], the write gate's weight in both moments."""
        return torch.ones_like(decay.to_end) if self.beta is None else self.beta.square()

    def states(self, decay: Decay, values: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Chunk-start states [M,H,K,V] and final states [N,H,K,V] of sum k values^T."""
        weights = decay.to_end * self.beta_squared(decay)
        local = chunk_moments(weights, self.k, values)
        if initial is None:
            shape = (self.layout.num_sequences, self.heads, self.head_dim, values.shape[-1])
            initial = self.q.new_zeros(shape)
        return scan(local, decay.whole, initial.to(local.dtype), self.layout)

    @cached_property
    def states_h(self) -> tuple[Tensor, Tensor]:
        return self.states(self.decay_h, self.k, self.tokens.h0)

    @cached_property
    def states_u(self) -> tuple[Tensor, Tensor]:
        return self.states(self.decay_u, self.v, self.tokens.u0)

    def system(self, rows: slice) -> System:
        """The ridge systems of the tokens of some chunks."""
        weights = self.decay_h[rows].mask
        if self.beta is not None:
            weights = weights * self.beta[rows].square().unsqueeze(-2)
        return System(self.k[rows], self.states_h[0][rows], self.decay_h[rows].zeta, weights)

    def solve(self, system: System, q: Tensor) -> Tensor:
        """x_t of the tokens of some chunks, by the settings' solver."""
        return self.settings.make_solver().solve(system, q)

    def weights_u(self, rows: slice) -> Tensor:
        """W_tj of U [M,H,C,C]."""
        mask = self.decay_u[rows].mask
        return mask if self.beta is None else mask * self.beta[rows].square().unsqueeze(-2)

    def blocks(self) -> list[slice]:
        """Slices of chunks that are processed together."""
        limit = BLOCK_ELEMENTS.get(self.q.device.type, BLOCK_ELEMENTS_ELSEWHERE)
        per_chunk = self.heads * self.settings.chunk_size * max(self.head_dim, self.v.shape[-1])
        return list(self.layout.blocks(max(1, limit // per_chunk)))


@dataclass(frozen=True)
class Forward:
    """The results of a forward pass.

    Attributes:
        o: [B,T,H,V].
        x: the solutions [B,T,H,K], None without a solve.
        h, u: final states; h is None unless it is formed.
        x_scale: divisors of the rows of x [B,T,H]; None if x is not scaled.
        kept: states at chunk starts for the backward pass (`Settings.keep_states`); None if not kept.
    """

    o: Tensor
    x: Tensor | None
    h: Tensor | None
    u: Tensor
    x_scale: Tensor | None = None
    kept: Tensor | None = None


def token_steps(tokens: Tokens, settings: Settings) -> Tensor:
    """Steps that "adaptive" or "cg" takes in each token's chunk, int64 [B,T,H]."""
    chunks = Chunks(tokens, settings)
    steps = torch.empty_like(chunks.decay_h.zeta, dtype=torch.int64)
    for rows in chunks.blocks():
        system = chunks.system(rows)
        steps[rows] = settings.make_solver().steps(system, chunks.q[rows]).unsqueeze(-1)
    return chunks.join(steps)


class ScannedStates(NamedTuple):
    """H and U at chunk starts [M,H,K,.], and after the last chunk of each sequence [N,H,K,.]."""

    h_start: Tensor
    u_start: Tensor
    h: Tensor
    u: Tensor


def chunk_states(tokens: Tokens, settings: Settings) -> ScannedStates:
    """The states alone, float32 or better. q serves as a shape. Not differentiable by autograd."""
    chunks = Chunks(tokens, settings)
    (h_start, h), (u_start, u) = chunks.states_h, chunks.states_u
    return ScannedStates(h_start, u_start, h, u)


def chunk_forward(tokens: Tokens, settings: Settings) -> Forward:
    """The map of `reference`, chunk by chunk. Not differentiable by autograd; `adjoint` has its gradients."""
    tokens, reach = take_out(tokens, settings.tied)
    chunks = Chunks(tokens, settings)
    solve = settings.num_iter > 0
    x = torch.empty_like(chunks.q) if solve else None
    o = chunks.q.new_empty(*chunks.q.shape[:-1], tokens.v.shape[-1])
    for rows in chunks.blocks():
        q = chunks.q[rows]
        z = q
        if x is not None:
            x[rows] = chunks.solve(chunks.system(rows), q)
            z = mix(q, x[rows], None if chunks.alpha is None else chunks.alpha[rows])
        u, zeta = chunks.states_u[0][rows], chunks.decay_u[rows].zeta
        o[rows] = readout(z, chunks.k[rows], chunks.v[rows], u, zeta, chunks.weights_u(rows))
    h = chunks.states_h[1] if solve or settings.with_h else None
    o = chunks.join(o).mul(settings.scale).to(tokens.q.dtype)
    o, h, u = put_back(o, h, chunks.states_u[1], reach, tokens, solve)
    return Forward(o=o, x=None if x is None else chunks.join(x).contiguous(), h=h, u=u)
