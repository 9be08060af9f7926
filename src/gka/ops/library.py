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


def keep_signature(*functions: type[torch.autograd.Function]) -> None:
    """apply() asks for forward's signature at every call, which takes the host as long as launches."""
    for function in functions:
        function.forward.__signature__ = inspect.signature(function.forward)
