"""The gates of a layer as one operator."""

import torch
from torch import Tensor

from gka.ops.fusion import check_shape, current, refuse_second
from gka.ops.library import keep_signature, operator


def gates(
    b: Tensor | None,
    a2: Tensor | None,
    a: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """beta, alpha and g of the pre-activations that there are."""
    from gka.kernels.surround import launch as surround

    given = surround.GateInputs(b, a2, a, A_log, dt_bias, lengths, eps)
    with current(given.any):
        found = surround.gates(given)
    return [x for x in found if x is not None]


forward_op = operator(gates)


@torch.library.register_fake(forward_op)
def _(b, a2, a, A_log, dt_bias, lengths, eps):
    return [x.new_empty(x.shape, dtype=torch.float32) for x in (b, a2, a) if x is not None]


def gates_backward(
    b: Tensor | None,
    a2: Tensor | None,
    a: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lengths: Tensor | None,
    grads: list[Tensor],
) -> list[Tensor]:
    """Gradients of b, a2, a, A_log and dt_bias, of those that there are; `grads` as gates gives them."""
    from gka.kernels.surround import launch as surround

    given = surround.GateInputs(b, a2, a, A_log, dt_bias, lengths, 0.0)
    rest = iter(grads)
    dbeta, dalpha, dg = (None if x is None else next(rest) for x in given.inputs)
    with current(given.any):
        inputs, rate, shift = surround.gates_backward(given, (dbeta, dalpha, dg))
    return [x for x in (*inputs, rate, shift) if x is not None]


backward_op = operator(gates_backward)


@torch.library.register_fake(backward_op)
def _(b, a2, a, A_log, dt_bias, lengths, grads):
    return [x.new_empty(x.shape) for x in (b, a2, a, A_log, dt_bias) if x is not None]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        *given, count = inputs
        return tuple(backward_op(*given[: len(given) - count], list(given[len(given) - count :])))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second("The fused gates")


class GatesFunction(torch.autograd.Function):
    """gka::gates, differentiable."""

    @staticmethod
    def forward(b, a2, a, A_log, dt_bias, lengths, eps):
        return tuple(forward_op(b, a2, a, A_log, dt_bias, lengths, eps))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        grads = tuple(grad.contiguous() for grad in grads)
        if torch.compiler.is_compiling():
            found = backward_op(*tensors, list(grads))
        else:
            found = _Backward.apply(*tensors, *grads, len(grads))
        rest = iter(found)
        every = [None if x is None else next(rest) for x in tensors[:5]]
        needed = ctx.needs_input_grad
        wanted = (grad if need else None for grad, need in zip(every, needed, strict=False))
        return *wanted, None, None


def check_gates(
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    decay: tuple[Tensor | None, Tensor | None],
) -> None:
    """Pre-activations of beta, alpha and g share one shape [B,T,H]; A_log and dt_bias are [H], with g's.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    shapes = [x.shape for x in inputs if x is not None]
    if shapes and len(shapes[0]) != 3:
        raise ValueError(f"gates are [batch,tokens,heads]; got {list(shapes[0])}.")
    for name, x in zip(("b", "alpha", "a"), inputs, strict=True):
        check_shape(name, x, tuple(shapes[0]) if shapes else ())
    if inputs[2] is None:
        return
    for name, x in zip(("A_log", "dt_bias"), decay, strict=True):
        if x is None:
            raise ValueError(f"a needs {name}.")
        check_shape(name, x, (shapes[0][-1],))


keep_signature(GatesFunction, _Backward)


def layer_gates(
    b: Tensor | None = None,
    alpha: Tensor | None = None,
    a: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """beta = sigmoid(b) + eps, alpha = sigmoid(alpha), g = -exp(A_log) softplus(a + dt_bias), fused.

    Args:
        b, alpha, a: pre-activations [B,T,H]; None for a gate that is not there.
        A_log, dt_bias: [H], with a.
        eps: added to beta.
        lengths: g of a row is zero from there on [B].

    Returns:
        beta, alpha, g [B,T,H] float32, None where their pre-activation is.

    Raises:
        ValueError: shapes that do not fit; the message names which.
    """
    check_gates((b, alpha, a), (A_log, dt_bias))
    b, alpha, a = (None if x is None else x.contiguous() for x in (b, alpha, a))
    if b is None and alpha is None and a is None:
        return None, None, None
    if a is None:
        A_log = dt_bias = None
    elif A_log is not None and dt_bias is not None:
        A_log, dt_bias = A_log.contiguous(), dt_bias.contiguous()
    rest = iter(GatesFunction.apply(b, alpha, a, A_log, dt_bias, lengths, eps))
    beta, alpha, g = (None if x is None else next(rest) for x in (b, alpha, a))
    return beta, alpha, g
