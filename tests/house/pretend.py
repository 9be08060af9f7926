"""A Hopper GPU that is not there: tensors in ordinary memory say they are on it, and launches do nothing.

Only torch, Triton, NVRTC and the CUDA driver are replaced, nothing of this library, so what is under test
may be laid out in any way. Results hold whatever was in memory.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from triton.runtime.jit import JITFunction

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FACTORIES = (
    "empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "linspace",
    "empty_like", "zeros_like", "ones_like", "full_like",
)  # fmt: skip
METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "to")
LOADED = ctypes.CDLL


class Library(LOADED):
    """A shared library; of NVRTC and the driver one whose every function succeeds and does nothing."""

    def __init__(self, name: str | None, *args: Any, **options: Any) -> None:
        self.absent = name is not None and ("nvrtc" in name or "libcuda.so" in name)
        if not self.absent:
            super().__init__(name, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: 0) if self.absent else super().__getattr__(name)


def _place(x: Any) -> Any:
    """A device as it is here."""
    named = isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda"))
    return CPU if named else x


def _in_memory(function: Callable) -> Callable:
    """The function, which makes its tensors in ordinary memory."""

    @functools.wraps(function)
    def made(*args: Any, **options: Any) -> Any:
        if "device" in options:
            options["device"] = _place(options["device"])
        return function(*(_place(x) for x in args), **options)

    return made


def _device_calls() -> dict[str, Callable]:
    """What is asked of torch.cuda, answered for a Hopper GPU."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="Hopper")
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    return {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "is_current_stream_capturing": lambda: False,
        "device": lambda *_: nullcontext(),
    }


@contextmanager
def hopper() -> Iterator[None]:
    """Inside, every tensor says that it is on a Hopper GPU."""
    compiled = MagicMock(name="compiled Triton kernel")
    with ExitStack() as stack:
        change = lambda owner, name, value: stack.enter_context(patch.object(owner, name, value))  # noqa: E731
        change(ctypes, "CDLL", Library)
        # what is not compiled must not be kept
        stack.enter_context(patch.dict(os.environ, GKA_COMPILE_CACHE="0"))
        change(JITFunction, "run", lambda *_, **__: compiled)
        for name, answer in _device_calls().items():
            change(torch.cuda, name, answer)
        for owner, names in ((torch, FACTORIES), (torch.Tensor, METHODS)):
            for name in names:
                change(owner, name, _in_memory(getattr(owner, name)))
        change(torch.Tensor, "pin_memory", lambda x: x)
        raw = patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True)
        stack.enter_context(raw)
        torch.Tensor.device = property(lambda _: GPU)  # pyright: ignore[reportAttributeAccessIssue]
        stack.callback(lambda: delattr(torch.Tensor, "device"))
        yield
