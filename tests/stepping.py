"""Tokens and pools of states for the ops that update states in place, and what they must give."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.ops import advance_states_, chunk_gka, fused_recurrent_gka_

GATES = ("g", "gk", "alpha", "beta")


@dataclass(frozen=True)
class Pool:
    """Inputs of `fused_recurrent_gka_`: tokens [B,T,...], states of P places, the place of each sequence.

    Attributes:
        tokens: q, k, v and the gates that are there, by name. tied: g is passed as gk too.
        h, u: [P,H,K,K], [P,H,K,V].
    """

    tokens: dict[str, Tensor]
    tied: bool
    h: Tensor
    u: Tensor
    indices: Tensor | None

    def fresh(self) -> "Pool":
        """The same with states of its own to change."""
        return replace(self, h=self.h.clone(), u=self.u.clone())

    def to(self, device: str, dtype: torch.dtype, u_dtype: torch.dtype = torch.float32) -> "Pool":
        """Heads in `dtype`, gates and H in the working precision, U stored as `u_dtype`."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        tokens = {n: x.to(device, work if n in GATES else dtype) for n, x in self.tokens.items()}
        u_dtype = work if dtype == torch.float64 else u_dtype
        indices = None if self.indices is None else self.indices.to(device)
        return Pool(tokens, self.tied, self.h.to(device, work), self.u.to(device, u_dtype), indices)

    def named(self, first: int | None = None) -> dict[str, Any]:
        """Arguments by name, of the first tokens only if told."""
        tokens: dict[str, Any] = {n: x[:, :first] for n, x in self.tokens.items()}
        return tokens | ({"gk": tokens["g"]} if self.tied else {})

    def step(self, **options: Any) -> Tensor:
        with torch.no_grad():
            return fused_recurrent_gka_(
                **self.named(), state=(self.h, self.u), state_indices=self.indices, **options
            )

    def advance(self, counts: Tensor, **options: Any) -> None:
        given = {n: x for n, x in self.named().items() if n not in ("q", "alpha")}
        advance_states_(
            **given, counts=counts, state=(self.h, self.u), state_indices=self.indices, **options
        )


def make_pool(
    length: int = 2,
    heads: tuple[int, int, int] = (2, 2, 2),
    dims: tuple[int, int] = (16, 16),
    *,
    gates: str = "g a b",
    tied: bool = True,
    places: list[int] | None = None,
    batch: int = 2,
    mean: float = 0.5,
    seed: int = 0,
) -> Pool:
    """Unit SiLU queries and keys, states of 40 earlier tokens, in float64 on the CPU.

    `places` are the indices into a pool of five; `gates` lists g, gk, a(lpha), b(eta).
    """
    torch.manual_seed(seed)
    (h, hk, hv), (key_dim, value_dim) = heads, dims
    batch = batch if places is None else len(places)
    pool = batch if places is None else 5

    def unit(*shape: int) -> Tensor:
        return normalize(silu(torch.randn(*shape, dtype=torch.float64) + mean), dim=-1)

    tokens = {
        "q": unit(batch, length, h, key_dim),
        "k": unit(batch, length, hk, key_dim),
        "v": torch.randn(batch, length, hv, value_dim, dtype=torch.float64),
    }
    for letter, name in (("g", "g"), ("gk", "gk"), ("a", "alpha"), ("b", "beta")):
        if letter in gates.split():
            draw = torch.rand(batch, length, h, dtype=torch.float64)
            tokens[name] = -0.1 * draw if name in ("g", "gk") else 0.1 + 0.9 * draw
    past = unit(pool, h, 40, key_dim)
    values = torch.randn(pool, h, 40, value_dim, dtype=torch.float64)
    indices = None if places is None else torch.tensor(places)
    return Pool(tokens, tied and "g" in tokens, past.mT @ past, past.mT @ values, indices)


def expected(pool: Pool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o and the states after, by `chunk_gka` sequence by sequence in float64 on the CPU."""
    pool = pool.to("cpu", torch.float64).fresh()
    places = range(len(pool.tokens["q"])) if pool.indices is None else pool.indices.tolist()
    o = torch.zeros(*pool.tokens["q"].shape[:3], pool.u.shape[-1], dtype=torch.float64)
    for b, place in enumerate(places):
        if place < 0:
            continue
        tokens: dict[str, Any] = {n: x[b : b + 1] for n, x in pool.tokens.items()}
        tokens |= {"gk": tokens["g"]} if pool.tied else {}
        state = (pool.h[place : place + 1], pool.u[place : place + 1])
        o[b : b + 1], final = chunk_gka(
            **tokens, initial_state=state, output_final_state=True, backend="torch", **options
        )
        assert final is not None
        pool.h[place], pool.u[place] = final[0][0], final[1][0]
    return o, pool.h, pool.u
