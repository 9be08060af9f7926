"""RMSNorm of each head, gated by SiLU, as one operator."""

import torch
from torch import Tensor

from gka.ops.fusion import check_shape, current, refuse_second
from gka.ops.library import keep_signature, operator


def gated_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Contiguous, in the shape and dtype of x."""
    from gka.kernels.surround import launch as surround

    with current(x):
        return surround.gated_norm(x, gate, weight, eps)


forward_op = operator(gated_norm)


@torch.library.register_fake(forward_op)
def _(x, gate, weight, eps):
    return x.new_empty(x.shape)


def gated_norm_backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the gate (empty without one) and the weight."""
    from gka.kernels.surround import launch as surround

    with current(x):
        dx, dgate, dweight = surround.gated_norm_backward(x, gate, weight, dout, eps)
    return dx, x.new_empty(0) if dgate is None else dgate, dweight


backward_op = operator(gated_norm_backward)


@torch.library.register_fake(backward_op)
def _(x, gate, weight, dout, eps):
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), dgate, weight.new_empty(weight.shape)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return backward_op(*inputs)

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
        return forward_op(x, gate, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        (dout,) = grads
        derive = backward_op if torch.compiler.is_compiling() else _Backward.apply
        found = derive(*ctx.saved_tensors, dout.contiguous(), ctx.eps)
        needed = ctx.needs_input_grad
        return *(grad if need else None for grad, need in zip(found, needed, strict=False)), None


keep_signature(GatedNorm, _Backward)


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, times SiLU(gate), fused.

    Args:
        x: [...,V]. gate: as many elements in the same order, or None. weight: [V].

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: a gate or weight that does not fit x.
    """
    check_shape("weight", weight, (x.shape[-1],))
    if gate is not None and gate.numel() != x.numel():
        raise ValueError(
            f"gate must have as many elements as x {list(x.shape)}; got {list(gate.shape)}."
        )
    gate = None if gate is None else gate.contiguous()
    return GatedNorm.apply(x.contiguous(), gate, weight.contiguous(), eps)
