"""Decoding on a GPU, token by token with states in place: each op is one launch of a backend."""

from torch import Tensor

from gka.kernels.passes import Passes, execute
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.recurrent import States, fresh_states, fresh_x


def step(
    passes: Passes, tokens: Tokens, settings: Settings, states: States, commit: bool = True,
    x: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """o [B,T,H,V]: `maths.recurrent.step_` in one launch."""
    batch, length, heads, _ = tokens.q.shape
    o = tokens.q.new_empty(batch, length, heads, tokens.v.shape[-1])
    if o.numel() > 0:
        execute(passes.step(tokens, settings, states, commit, o, x))
    return o


def advance(
    passes: Passes, tokens: Tokens, settings: Settings, states: States, counts: Tensor
) -> None:
    """`maths.recurrent.advance_` in one launch."""
    execute(passes.advance(tokens, settings, states, counts))


def recurrent_forward(passes: Passes, tokens: Tokens, settings: Settings) -> Forward:
    """`maths.recurrent.recurrent_forward` in one launch."""
    states, x = fresh_states(tokens, settings), fresh_x(tokens, settings)
    o = step(passes, tokens, settings, states, True, x)
    return Forward(o=o, x=x, h=states.h, u=states.u)


def gates_of(tokens: Tokens, settings: Settings) -> dict[str, Tensor | None]:
    """The gates by name in float32; a tied decay stands for both g and gk."""
    t = tokens
    gates = {"g": t.g, "gk": t.g if settings.tied else t.gk, "alpha": t.alpha, "beta": t.beta}
    return {name: None if x is None else x.float() for name, x in gates.items()}


def inputs_of(tokens: Tokens, settings: Settings) -> dict[str, Tensor | None]:
    """q, k, v and the gates by name; the last dimension is contiguous."""
    heads = {"q": tokens.q, "k": tokens.k, "v": tokens.v}
    flat = {
        name: x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        for name, x in heads.items()
    }
    return flat | gates_of(tokens, settings)
