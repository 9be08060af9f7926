"""Compile CUDA C++ at run time by NVRTC, which PyTorch's CUDA builds ship.

Bound with ctypes, because torch's own entry (`torch.cuda._compile_kernel`) is private and changes.
"""

import ctypes
import functools
import glob
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch


class CompilationError(RuntimeError):
    """NVRTC refused a kernel; the message has its log."""


@functools.cache
def _library() -> ctypes.CDLL:
    """libnvrtc of the CUDA version that torch was built for. Where torch has no CUDA, of any version: it
    can compile, though nothing can be launched."""
    version = torch.version.cuda
    name = f"libnvrtc.so.{version.split('.')[0] if version else '[0-9]*'}"
    wheels = importlib.util.find_spec("nvidia")  # NVIDIA's Python packages, which contain libraries
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


@functools.cache
def version() -> str:
    """Version of NVRTC, and the size of its library where its file is known: builds share a version."""
    lib, numbers = _library(), (ctypes.c_int(), ctypes.c_int())
    lib.nvrtcVersion(*map(ctypes.byref, numbers))
    file = Path(lib._name)
    size = f", {file.stat().st_size} bytes" if file.is_file() else ""
    return f"NVRTC {numbers[0].value}.{numbers[1].value}{size}"


def options_for(arch: str) -> tuple[str, ...]:
    """NVRTC's options for a chip, such as "sm_90a"."""
    return f"--gpu-architecture={arch}", "--std=c++17"


def compile_cubin(
    source: str, name: str, arch: str, headers: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """Machine code of `source` for `arch` ("sm_90a"); `headers`: texts of the files it may include, by name.

    Raises:
        CompilationError: NVRTC refused the source; the message has its log.
    """
    return compile_with_notes(source, name, arch, headers)[0]


def compile_with_notes(
    source: str, name: str, arch: str, headers: Mapping[str, str], *options: str
) -> tuple[bytes, str]:
    """Machine code and the compilers' log; with "--ptxas-options=-v" the assembler's notes too.

    Raises:
        CompilationError: NVRTC refused the source; the message has its log.
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
        flags = [*options_for(arch), *options]
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
