"""How this package's operators are made known to torch."""

import inspect
from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("gka", "DEF")


def operator(function: Callable, mutates: tuple[str, ...] = ()) -> torch._ops.OpOverload:
    """gka::<function's name>, which writes to the arguments `mutates`. Without the layers that
    torch.library.custom_op puts around each call (a derivative, which an autograd.Function has, and
    checks): they cost the host as much as launches."""
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(function.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.gka, function.__name__).default


def under_transform() -> bool:
    """Whether a transform of torch.func is at work (vmap, grad, ...); a constant to torch.compile."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def check_derivable(name: str) -> None:
    """Where torch.compile would lose the derivative of an autograd.Function, say so.

    Around a transform of torch.func Dynamo traces through the function's forward alone, and an operator in
    it has no derivative: the gradient would be zero. Which tensors want one cannot be seen there. Without
    fullgraph=True the call runs uncompiled instead.

    Raises:
        RuntimeError: a transform is compiled and gradients are on.
    """
    if torch.compiler.is_compiling() and under_transform() and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: torch.compile loses its gradient around a transform of torch.func. Compile inside "
            "the transform, torch.func.grad(torch.compile(f)), or call under torch.no_grad()."
        )


def keep_signature(*functions: type[torch.autograd.Function]) -> None:
    """apply() asks for forward's signature at every call, which takes the host as long as launches."""
    for function in functions:
        function.forward.__signature__ = inspect.signature(function.forward)
