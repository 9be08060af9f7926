"""Operators: their registration, autocast and profiling around them, and calls that need no second check."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from gka.maths.chunked import Settings
from gka.ops.backends import registered_backends

_LIBRARY = torch.library.Library("gka", "DEF")


def operator(function: Callable, mutates: tuple[str, ...] = ()) -> torch._ops.OpOverload:
    """Register gka::<function's name>, which writes to the arguments `mutates`.

    It does without the layers that torch.library.custom_op puts around each call (a derivative, which an
    autograd.Function supplies here, and checks): they cost the host as much as launches.
    """
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(function.__name__ + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.gka, function.__name__).default


def under_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, ...) is active; a constant to torch.compile."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def check_derivable(name: str) -> None:
    """Raise where torch.compile would lose the derivative of an autograd.Function.

    Inside a compiled torch.func transform Dynamo traces only the function's forward, whose operators have no
    derivative: the gradient would be zero. Whether any tensor needs one cannot be seen there. Without
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
    """Store forward's signature, which apply() otherwise inspects at every call, as slowly as launches."""
    for function in functions:
        function.forward.__signature__ = inspect.signature(function.forward)


def no_autocast(device: str) -> AbstractContextManager:
    """A context in which operators compute in the dtypes of their inputs."""
    return torch.amp.autocast(device, enabled=False) if autocasts(device) else nullcontext()


@contextmanager
def _annotated(name: str, device: str) -> Iterator[None]:
    with no_autocast(device), record_function(name):
        yield


def inside(name: str, device: str) -> AbstractContextManager:
    """Disable autocast and name the call in profiles, each only if one is active, since both take time."""
    if autocasts(device) or torch.autograd._profiler_enabled():
        return _annotated(name, device)
    return nullcontext()


def autocasts(device: str) -> bool:
    """Whether torch.autocast is on for the device.

    The meta device has no autocast and cannot be asked. torch.amp.is_autocast_available would tell, but
    torch 2.11's Dynamo cannot trace it.
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The heads, cast to torch.autocast's dtype if it is on, as for a matrix product."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def is_eager(q: Tensor) -> bool:
    """Whether autograd alone observes operators on q: no compiler, transform or dispatch mode."""
    return (
        q.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and not under_transform()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


PLAIN = (Tensor, torch.nn.Parameter)
"""Tensor types without behaviour of their own in operators."""


class Known(NamedTuple):
    """The backend and settings of a checked kind of call; `backends`: those it was chosen from."""

    backends: object
    backend: str
    settings: Settings


KNOWN: dict[tuple, Known] = {}
KINDS = 1024  # kinds of call kept at most


def known(kind: tuple | None) -> tuple[str, Settings] | None:
    """The backend and settings of an earlier call of that kind; None if the call must be checked."""
    found = None if kind is None else KNOWN.get(kind)
    if found is None or found.backends is not registered_backends():
        return None
    return found.backend, found.settings


def keep(kind: tuple | None, backend: str, settings: Settings) -> None:
    """Remember the backend and settings of a checked call of that kind."""
    if kind is None:
        return
    if len(KNOWN) >= KINDS:
        KNOWN.clear()
    KNOWN[kind] = Known(registered_backends(), backend, settings)


def kind_of(*arguments: object) -> tuple | None:
    """The facts that checks and the choice of a backend depend on; None if every call is checked.

    Checks of GPU calls are remembered, since the host takes longer to check a call than to launch it.
    """
    if torch.compiler.is_compiling():
        return None
    q = arguments[0]
    if not isinstance(q, PLAIN) or not is_eager(q) or os.environ.get("GKA_DEBUG") == "1":
        return None
    cast = torch.get_autocast_dtype("cuda") if autocasts("cuda") else None
    kinds: list[object] = [arguments[3] is arguments[4], cast]
    for x in _flat(arguments):
        if type(x) in PLAIN:
            if x.is_nested:
                return None
            kinds.append((x.shape, x.dtype, x.get_device(), x.layout))
        elif x is None or type(x) in (int, float, bool, str):
            kinds += (type(x), x)  # True == 1, so the type is part of the key
        else:
            return None
    return tuple(kinds)


def _flat(arguments: tuple) -> Iterator[Any]:
    for x in arguments:
        if type(x) is tuple:
            yield "pair"
            yield from x
        else:
            yield x
