"""Fused operators around the op in a layer: the gates, RMSNorm gated by SiLU, and whether they can run.

Each operator is differentiable once.
"""

import importlib.util
import os
from operator import index

import torch
from torch import Tensor

from gka.ops.backends import current
from gka.ops.dispatch import keep_signature, operator

WIDEST_CONVOLUTION = 8
WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unfused(
    device: torch.device | str,
    dtype: torch.dtype,
    dims: tuple[int, int] = (128, 128),
    width: int = 4,
) -> str | None:
    """Why the kernels cannot run inputs of this device and dtype; None if they can.

    Args:
        dims: K and V. width: inputs that a convolution sees.
    """
    # as plain integers: symbolic ones would make the result no constant to torch.compile
    key_dim, value_dim = (index(dim) for dim in dims)
    return _why_unfused(torch.device(device), dtype, key_dim, value_dim, index(width))


# Dynamo cannot trace the search for packages
@torch.compiler.assume_constant_result
def _why_unfused(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, width: int
) -> str | None:
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16; got {dtype}."
    if max(key_dim, value_dim) > WIDEST_HEAD:
        return (
            f"the kernels take heads up to {WIDEST_HEAD} wide; got K = {key_dim}, V = {value_dim}."
        )
    if width > WIDEST_CONVOLUTION:
        return f"the kernels take conv_size up to {WIDEST_CONVOLUTION}; got {width}."
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed."
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, slow); got {device}."
    from gka.kernels import configs

    return configs.why_not_chip(device)


def check_shapes(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Check (name, tensor or None, expected shape), since kernels rely on their arguments' shapes.

    Raises:
        ValueError: a tensor has another shape.
    """
    for name, x, shape in expected:
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(x.shape)}.")


def refuse_second(name: str):
    """Raise the error of a second derivative."""
    raise RuntimeError(
        f"{name} has no second derivative. "
        'Use backend="reference" (of a layer: its argument or attribute) for second derivatives.'
    )


def gates(
    b: Tensor | None,
    a2: Tensor | None,
    a: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """beta, alpha and g, those whose pre-activations are given."""
    from gka.kernels.surround import launch as surround

    given = surround.GateInputs(b, a2, a, A_log, dt_bias, lengths, eps)
    with current(given.any.device):
        found = surround.gates(given)
    return [x for x in found if x is not None]


gates_op = operator(gates)


@torch.library.register_fake(gates_op)
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
    """Gradients of b, a2, a, A_log and dt_bias, those that are given; `grads`: of the results of `gates`."""
    from gka.kernels.surround import launch as surround

    given = surround.GateInputs(b, a2, a, A_log, dt_bias, lengths, 0.0)
    rest = iter(grads)
    dbeta, dalpha, dg = (None if x is None else next(rest) for x in given.inputs)
    with current(given.any.device):
        inputs, rate, shift = surround.gates_backward(given, (dbeta, dalpha, dg))
    return [x for x in (*inputs, rate, shift) if x is not None]


gates_backward_op = operator(gates_backward)


@torch.library.register_fake(gates_backward_op)
def _(b, a2, a, A_log, dt_bias, lengths, grads):
    return [x.new_empty(x.shape) for x in (b, a2, a, A_log, dt_bias) if x is not None]


class _GatesBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        *given, count = inputs
        return tuple(
            gates_backward_op(*given[: len(given) - count], list(given[len(given) - count :]))
        )

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
        return tuple(gates_op(b, a2, a, A_log, dt_bias, lengths, eps))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        grads = tuple(grad.contiguous() for grad in grads)
        if torch.compiler.is_compiling():
            found = gates_backward_op(*tensors, list(grads))
        else:
            found = _GatesBackward.apply(*tensors, *grads, len(grads))
        rest = iter(found)
        every = [None if x is None else next(rest) for x in tensors[:5]]
        needed = ctx.needs_input_grad
        wanted = (grad if need else None for grad, need in zip(every, needed, strict=False))
        return *wanted, None, None


def check_gates(
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    decay: tuple[Tensor | None, Tensor | None],
) -> None:
    """Check that pre-activations share one shape [B,T,H], and that A_log and dt_bias [H] come with g's.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    shapes = [x.shape for x in inputs if x is not None]
    if shapes and len(shapes[0]) != 3:
        raise ValueError(f"gates are [batch,tokens,heads]; got {list(shapes[0])}.")
    for name, x in zip(("b", "alpha", "a"), inputs, strict=True):
        check_shapes((name, x, tuple(shapes[0]) if shapes else ()))
    if inputs[2] is None:
        return
    for name, x in zip(("A_log", "dt_bias"), decay, strict=True):
        if x is None:
            raise ValueError(f"a needs {name}.")
        check_shapes((name, x, (shapes[0][-1],)))


keep_signature(GatesFunction, _GatesBackward)


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
        b, alpha, a: pre-activations [B,T,H]; None for an absent gate.
        A_log, dt_bias: [H]; given with a.
        eps: added to beta.
        lengths: tokens of each row [B]; later g are zero.

    Returns:
        beta, alpha, g [B,T,H] float32, each None if its pre-activation is.

    Raises:
        ValueError: shapes do not fit; the message names them.
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


def gated_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The gated norm, contiguous, in the shape and dtype of x."""
    from gka.kernels.surround import launch as surround

    with current(x.device):
        return surround.gated_norm(x, gate, weight, eps)


norm_op = operator(gated_norm)


@torch.library.register_fake(norm_op)
def _(x, gate, weight, eps):
    return x.new_empty(x.shape)


def gated_norm_backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the gate (empty without one) and the weight."""
    from gka.kernels.surround import launch as surround

    with current(x.device):
        dx, dgate, dweight = surround.gated_norm_backward(x, gate, weight, dout, eps)
    return dx, x.new_empty(0) if dgate is None else dgate, dweight


norm_backward_op = operator(gated_norm_backward)


@torch.library.register_fake(norm_backward_op)
def _(x, gate, weight, dout, eps):
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), dgate, weight.new_empty(weight.shape)


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return norm_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second("The fused norm")


class GatedNorm(torch.autograd.Function):
    """gka::gated_norm, differentiable."""

    @staticmethod
    def forward(x, gate, weight, eps):
        return norm_op(x, gate, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        (dout,) = grads
        derive = norm_backward_op if torch.compiler.is_compiling() else _NormBackward.apply
        found = derive(*ctx.saved_tensors, dout.contiguous(), ctx.eps)
        needed = ctx.needs_input_grad
        return *(grad if need else None for grad, need in zip(found, needed, strict=False)), None


keep_signature(GatedNorm, _NormBackward)


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, times SiLU(gate), fused.

    Args:
        x: [...,V].
        gate: as many elements in the same order, or None.
        weight: [V].

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ValueError: a gate or weight that does not fit x.
    """
    check_shapes(("weight", weight, (x.shape[-1],)))
    if gate is not None and gate.numel() != x.numel():
        raise ValueError(
            f"gate must have as many elements as x {list(x.shape)}; got {list(gate.shape)}."
        )
    gate = None if gate is None else gate.contiguous()
    return GatedNorm.apply(x.contiguous(), gate, weight.contiguous(), eps)
