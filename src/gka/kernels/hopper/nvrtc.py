"""CUDA C++ compiled at run time by NVRTC, which PyTorch's CUDA builds ship, and launched by the driver.

Bound with ctypes: torch's own entry (`torch.cuda._compile_kernel`) is private and changes.
"""

import ctypes
import functools
import glob
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

import torch


class CompilationError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


@functools.cache
def _library() -> ctypes.CDLL:
    """libnvrtc of the CUDA version that torch was built for; of any version where torch has no CUDA, which
    then compiles but cannot launch."""
    version = torch.version.cuda
    name = f"libnvrtc.so.{version.split('.')[0] if version else '[0-9]*'}"
    wheels = importlib.util.find_spec("nvidia")  # where NVIDIA's Python packages keep libraries
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    found = [path for folder in folders for path in sorted(glob.glob(f"{folder}/*/lib/{name}"))]
    for path in (name, *found):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    where = " or ".join(["the library path", *folders])
    raise OSError(f"{name} was not found on {where} (pip install nvidia-cuda-nvrtc)")


def why_missing() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    try:
        _library()
    except OSError as error:
        return str(error)
    return None


def compile_cubin(
    source: str, name: str, arch: str, headers: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Machine code of `source` for `arch` ("sm_90a"); `headers`: what it may include, by name.

    Raises:
        CompilationError: with NVRTC's log.
    """
    return compile_with_notes(source, name, arch, headers)[0]


def compile_with_notes(
    source: str, name: str, arch: str, headers: Mapping[str, str], *options: str
) -> tuple[bytes, str]:
    """Machine code and what the compilers say of it; with "--ptxas-options=-v" the assembler's notes too.

    Raises:
        CompilationError: with NVRTC's log.
    """
    lib = _library()
    program = ctypes.c_void_p()
    count = len(headers)
    texts = (ctypes.c_char_p * count)(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * count)(*(file.encode() for file in headers))
    made = lib.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), count, texts, names
    )
    if made:
        raise CompilationError(f"NVRTC could not start on {name} (error {made}).")
    try:
        flags = [f"--gpu-architecture={arch}", "--std=c++17", *options]
        given = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = lib.nvrtcCompileProgram(program, len(flags), given)
        log = _read(lib, program, "ProgramLog")
        if failed:
            raise CompilationError(f"{name} for {arch}:\n{log}")
        return _read_bytes(lib, program, "CUBIN"), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _read_bytes(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _read(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    return _read_bytes(lib, program, what).rstrip(b"\0").decode()


_Pointer = ctypes.c_void_p * 1


class Kernel:
    """A kernel of one argument, a structure, on the current device."""

    _MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

    def __init__(self, cubin: bytes, name: str, threads: int, shared: int) -> None:
        self.threads, self.shared = threads, shared
        torch.cuda.current_stream()  # the device's context exists from here on
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
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointer = _Pointer(ctypes.addressof(arguments))
        launched = self.launch(
            self.function, *grid, 1, self.threads, 1, 1, self.shared, stream, pointer, None
        )
        if launched:
            self._check(launched, "launch")

    def _check(self, error: int, doing: str) -> None:
        if error:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(error, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            raise RuntimeError(f"CUDA could not {doing} a kernel: {reason} ({error}).")
