"""Load and launch machine code through the CUDA driver API, bound with ctypes."""

import ctypes
import functools
from collections.abc import Callable

import torch

Pointer = ctypes.c_void_p * 1


def current_stream() -> ctypes.c_void_p:
    """The current device's current stream; torch.cuda.current_stream() takes the host 20 times as long."""
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))


class Kernel:
    """A kernel, whose one argument is a structure, loaded on the current device."""

    _MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

    def __init__(self, cubin: bytes, name: str, threads: int, shared: int) -> None:
        self.threads, self.shared = threads, shared
        torch.cuda.current_stream()  # creates the device's context
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.launch = self.driver.cuLaunchKernel
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(self.module), cubin), "load")
        found = self.driver.cuModuleGetFunction(
            ctypes.byref(self.function), self.module, name.encode()
        )
        self._check(found, "find")
        self._check(
            self.driver.cuFuncSetAttribute(self.function, self._MAX_DYNAMIC_SHARED_SIZE, shared),
            "set the shared memory of",
        )

    def __call__(self, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
        """Launch on a grid of blocks, on torch's current stream."""
        launched = self.bind(grid)(current_stream(), Pointer(ctypes.addressof(arguments)), None)
        self.check_launch(launched)

    def bind(self, grid: tuple[int, int]) -> Callable[..., int]:
        """The launch on a grid of blocks as a function of (stream, pointer to the arguments' address, None).

        The function returns an error code for `check_launch`.
        """
        return functools.partial(
            self.launch, self.function, *grid, 1, self.threads, 1, 1, self.shared
        )

    def check_launch(self, error: int) -> None:
        """Raise RuntimeError if a launch failed."""
        self._check(error, "launch")

    def _check(self, error: int, doing: str) -> None:
        if error:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(error, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            raise RuntimeError(f"CUDA could not {doing} a kernel: {reason} ({error}).")
