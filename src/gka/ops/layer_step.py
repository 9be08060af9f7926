"""A layer's cached step up to its memory as one operator, which updates the convolutions' states in place."""

import torch
from torch import Tensor

from gka.ops.convolution import check_parts
from gka.ops.fusion import current
from gka.ops.gates import check_gates
from gka.ops.library import operator

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def layer_step(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor | None,
    sq: Tensor,
    sk: Tensor,
    sv: Tensor | None,
    b: Tensor | None,
    a2: Tensor | None,
    a: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lengths: Tensor | None,
    head_dim: int,
    eps: float,
) -> list[Tensor]:
    """Unit q, unit k, v, beta, alpha and g, of those that there are."""
    from gka.kernels.surround import launch as surround

    parts = surround.Parts((q, k, v), (wq, wk, wv), (sq, sk, sv), None, lengths, head_dim)
    with current(q):
        heads, gates = surround.step(
            parts, surround.GateInputs(b, a2, a, A_log, dt_bias, lengths, eps)
        )
    return [x for x in (*heads, *gates) if x is not None]


step_op = operator(layer_step, mutates=("sq", "sk", "sv"))


@torch.library.register_fake(step_op)
def _(q, k, v, wq, wk, wv, sq, sk, sv, b, a2, a, A_log, dt_bias, lengths, head_dim, eps):
    heads = [x.new_empty(x.shape) for x in (q, k, v) if x is not None]
    gates = [x.new_empty(x.shape, dtype=torch.float32) for x in (b, a2, a) if x is not None]
    return heads + gates


def step_heads_and_gates(
    inputs: Three,
    weights: Three,
    states: Three,
    gates: Three,
    decay: tuple[Tensor | None, Tensor | None],
    head_dim: int,
    *,
    eps: float = 0.0,
    lengths: Tensor | None = None,
) -> tuple[Three, Three]:
    """`convolve_heads` and `layer_gates` of a few tokens that follow a cached past, in one launch.

    Args:
        inputs, weights: as of `convolve_heads`.
        states: contiguous [B,C,W], updated in place.
        gates: pre-activations of beta, alpha and g. decay: A_log and dt_bias.
        lengths: tokens of each row that count [B]; None for all.

    Returns:
        (q, k, v) and (beta, alpha, g), each None where its input is. No gradient flows through.

    Raises:
        ValueError: shapes that do not fit, or a state that is missing or not contiguous.
    """
    check_parts(inputs, weights, states, head_dim)
    check_gates(gates, decay)
    for name, given, state in zip("qkv", inputs, states, strict=True):
        if given is not None and (state is None or not state.is_contiguous()):
            raise ValueError(
                f"the state of {name} is updated in place and must be there, contiguous."
            )
    x, pre = (tuple(None if y is None else y.contiguous() for y in ys) for ys in (inputs, gates))
    w = tuple(None if y is None else y.contiguous() for y in weights)
    found = iter(step_op(*x, *w, *states, *pre, *decay, lengths, head_dim, eps))
    q, k, v, beta, alpha, g = (None if y is None else next(found) for y in (*x, *pre))
    return (q, k, v), (beta, alpha, g)
