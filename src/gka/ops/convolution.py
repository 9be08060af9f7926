"""The short convolutions of queries, keys and values as one operator, with SiLU and unit norms.

Also a layer's cached step up to its memory, which updates the convolutions' states in place.
"""

import torch
from torch import Tensor

from gka.ops.backends import current
from gka.ops.dispatch import keep_signature, operator
from gka.ops.surround import check_gates, check_shapes, refuse_second


def past_tokens(cu_seqlens: Tensor, length: int, width: int) -> Tensor:
    """Number of tokens before each in its packed sequence, at most width - 1: uint8 [T]."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]
    return (tokens - start).clamp(max=width - 1).to(torch.uint8)


def _parts(
    q: Tensor, k: Tensor, v: Tensor | None, weights, states, past: Tensor | None,
    lengths: Tensor | None, head_dim: int,
):  # fmt: skip
    from gka.kernels.surround.launch import Parts

    return Parts((q, k, v), weights, states, past, lengths, head_dim)


def short_convolutions(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor | None,
    sq: Tensor | None,
    sk: Tensor | None,
    sv: Tensor | None,
    past: Tensor | None,
    lengths: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries, unit keys and values (empty without v), all contiguous."""
    from gka.kernels.surround import launch as surround

    parts = _parts(q, k, v, (wq, wk, wv), (sq, sk, sv), past, lengths, head_dim)
    with current(q.device):
        yq, yk, yv = surround.convolve(parts)
    assert yq is not None and yk is not None
    return yq, yk, q.new_empty(0) if yv is None else yv


forward_op = operator(short_convolutions)


@torch.library.register_fake(forward_op)
def _(q, k, v, wq, wk, wv, sq, sk, sv, past, lengths, head_dim):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v))


def short_convolutions_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor | None,
    sq: Tensor | None,
    sk: Tensor | None,
    sv: Tensor | None,
    past: Tensor | None,
    lengths: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    head_dim: int,
    with_inputs: bool,
    with_weights: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, wq, wk, wv; empty if the input is absent or needs none."""
    from gka.kernels.surround import launch as surround

    parts = _parts(q, k, v, (wq, wk, wv), (sq, sk, sv), past, lengths, head_dim)
    with current(q.device):
        dx, dw = surround.convolve_backward(parts, (dq, dk, dv), with_inputs, with_weights)
    return [q.new_empty(0) if x is None else x for x in (*dx, *dw)]


backward_op = operator(short_convolutions_backward)


@torch.library.register_fake(backward_op)
def _(
    q, k, v, wq, wk, wv, sq, sk, sv, past, lengths, dq, dk, dv, head_dim, with_inputs, with_weights
):  # fmt: skip
    def like(x: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(x.shape) if x is not None and wanted else q.new_empty(0)

    inputs = [like(x, with_inputs) for x in (q, k, v)]
    return [*inputs, *(like(w, with_weights) for w in (wq, wk, wv))]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return tuple(backward_op(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second("The fused convolution")


class ShortConvolutions(torch.autograd.Function):
    """gka::short_convolutions, differentiable in its inputs and weights."""

    @staticmethod
    def forward(q, k, v, wq, wk, wv, sq, sk, sv, past, lengths, head_dim):
        return forward_op(q, k, v, wq, wk, wv, sq, sk, sv, past, lengths, head_dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.head_dim = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        dq, dk, dv = (grad.contiguous() for grad in grads)
        with_inputs = any(ctx.needs_input_grad[:3])
        with_weights = any(ctx.needs_input_grad[3:6])
        derive = backward_op if torch.compiler.is_compiling() else _Backward.apply
        dv = None if tensors[2] is None else dv
        found = derive(*tensors, dq, dk, dv, ctx.head_dim, with_inputs, with_weights)
        wanted = (
            grad if needed else None
            for grad, needed in zip(found, ctx.needs_input_grad, strict=False)
        )
        return *wanted, *(None for _ in range(6))


Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def check_parts(inputs: Parts, weights: Parts, states: Parts, head_dim: int) -> None:
    """Inputs [B,T,C], weights [C,1,W] and states [B,C,W] of q, k and v fit together.

    Raises:
        ValueError: one does not, or q or k is missing; the message names it.
    """
    q, w = inputs[0], weights[0]
    if q is None or inputs[1] is None or w is None or q.dim() != 3 or w.dim() != 3:
        raise ValueError(
            "q and k [batch,tokens,channels] and their weights [channels,1,width] are needed."
        )
    for name, x, weight, state in zip("qkv", inputs, weights, states, strict=True):
        if (x is None) != (weight is None):
            raise ValueError(f"{name} and its weight come together or not at all.")
        if x is None:
            continue
        channels, width = x.shape[-1], w.shape[-1]
        check_shapes(
            (name, x, (*q.shape[:2], channels)),
            (f"the weight of {name}", weight, (channels, 1, width)),
            (f"the state of {name}", state, (q.shape[0], channels, width)),
        )
        if name != "v" and x.shape[-1] % head_dim:
            raise ValueError(
                f"{name} has {x.shape[-1]} channels, which are no heads of {head_dim}."
            )


keep_signature(ShortConvolutions, _Backward)


def convolve_heads(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    weights: tuple[Tensor, Tensor, Tensor | None],
    head_dim: int,
    states: Parts = (None, None, None),
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convolutions and SiLU of queries, keys and values, and the unit norm of each query and key, fused.

    y_t = SiLU(sum_i weight[:, 0, i] x_{t-W+1+i}); of q and k y / (|y|_2 + 1e-6) over each head.

    Args:
        inputs: q, k, v [B,T,C]; v is None if values are not convolved.
        weights: [C,1,W] each.
        head_dim: K.
        states: the previous W inputs [B,C,W], the newest last; None for zeros. They get no gradient.
        cu_seqlens: bounds [N+1] of sequences packed into B = 1, which do not see each other.
        lengths: tokens of each row [B]; later keys are zero.

    Returns:
        q, k, v [B,T,C] in the inputs' dtypes; v is None if its input is.

    Raises:
        ValueError: shapes do not fit; the message names them.
    """
    check_parts(inputs, weights, states, head_dim)
    q, k, v = (None if x is None else x.contiguous() for x in inputs)
    wq, wk, wv = (None if w is None else w.contiguous() for w in weights)
    sq, sk, sv = (None if s is None else s.detach().contiguous() for s in states)
    assert q is not None and wq is not None
    past = None
    if cu_seqlens is not None:
        past = past_tokens(cu_seqlens, q.shape[1], wq.shape[-1])
    yq, yk, yv = ShortConvolutions.apply(
        q, k, v, wq, wk, wv, sq, sk, sv, past, lengths, head_dim
    )  # fmt: skip
    return yq, yk, None if v is None else yv


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
    """Unit q, unit k, v, beta, alpha and g, those whose inputs are present."""
    from gka.kernels.surround import launch as surround

    parts = surround.Parts((q, k, v), (wq, wk, wv), (sq, sk, sv), None, lengths, head_dim)
    with current(q.device):
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
        inputs, weights: as in `convolve_heads`.
        states: contiguous [B,C,W], updated in place.
        gates: pre-activations of beta, alpha and g. decay: A_log and dt_bias.
        lengths: tokens of each row [B]; None: T.

    Returns:
        (q, k, v) and (beta, alpha, g), each None if its input is. Not differentiable.

    Raises:
        ValueError: shapes do not fit, or a state is missing or not contiguous.
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
