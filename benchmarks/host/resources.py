"""Registers, spills and shared memory of every kernel, compiled without a GPU.

`python -m benchmarks.run resources --arch 90 --dims 64 128 --dtypes bfloat16` prints one table. The
launcher runs as on the chip, but kernels are compiled and not launched. `--shared` prints only shared
memory and leaves out the assembler, which takes most of the time; it needs a separate TRITON_CACHE_DIR,
because the cached kernels cannot run.
"""

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import torch
import triton
from benchmarks.registry import SOLVERS
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.runtime.jit import JITFunction

from gka.kernels import backward, configs, decode, ends, forward
from gka.kernels.hopper import build, nvrtc
from gka.kernels.surround import launch as surround
from gka.kernels.triton import plan
from gka.kernels.triton.passes import TRITON
from gka.maths.chunked import Settings, Tokens
from gka.maths.ends import EndInputs
from gka.maths.recurrent import States
from gka.maths.solvers import SolverName

SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
REGISTERS = 65536  # per multiprocessor
SHARED_OF_PROCESSOR = {80: 164, 86: 100, 89: 100, 90: 228}  # KiB of shared memory


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel; `blocks` is the number that fit on a multiprocessor."""

    name: str
    warps: int
    registers: int
    spills: int
    shared: int
    blocks: int


class _Chip:
    """A Triton driver that has only a compilation target."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def as_if_on(arch: int) -> Iterator[None]:
    """In the block, Triton compiles for sm_<arch>, with that chip's launch configurations."""
    triton.runtime.driver.set_active(_Chip(arch))  # pyright: ignore[reportArgumentType]
    with patch.object(configs, "capability_of", lambda device: divmod(arch, 10)):
        yield


@contextmanager
def compiling_only(arch: int) -> Iterator[list]:
    """In the block, launches only compile for sm_<arch>; yields a list of (name, compiled kernel)."""
    compiled, original = [], JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    plan.plan_of.cache_clear()  # so that all kernels are compiled again
    surround._launchers.clear()
    try:
        with as_if_on(arch), patch.object(JITFunction, "run", run):
            yield compiled
    finally:
        plan.plan_of.cache_clear()
        surround._launchers.clear()


def problem(dim: int, dtype: torch.dtype, heads: int = 16, length: int = 2048) -> Tokens:
    """Tokens of the given size with every gate; only shapes and dtypes matter."""
    q, k, v = (torch.empty(1, length, heads, dim, dtype=dtype) for _ in range(3))
    gates = [torch.empty(1, length, heads) for _ in range(3)]
    g, alpha, beta = gates
    return Tokens(q, k, v, g, None, alpha, beta, None, None, None)


def run_all(dim: int, dtype: torch.dtype, solver: SolverName = "chebyshev") -> None:
    """Launch every kernel of a forward and a backward pass."""
    tokens = problem(dim, dtype)
    settings = Settings(1.0, 0.02, 30, 64, tied=True, with_h=False, solver=solver)
    out = forward.chunk_forward(TRITON, tokens, settings)
    backward.chunk_backward(
        TRITON, tokens, out.x, out.x_scale, torch.empty_like(tokens.v), None, None, settings
    )


def run_step(dim: int, dtype: torch.dtype, solver: SolverName) -> None:
    """Launch the kernel that takes single tokens."""
    tokens = problem(dim, dtype, length=1)
    h, u = (torch.empty(1, 16, dim, dim) for _ in range(2))
    settings = Settings(1.0, 0.02, 30, 64, tied=True, with_h=True, solver=solver)
    decode.step(TRITON, tokens, settings, States(h, u))


def run_around(dim: int, dtype: torch.dtype, heads: int = 16, length: int = 2048) -> None:
    """Launch every kernel around the op in a layer: with a past, packed, and in decoding."""
    channels, lengths = heads * dim, torch.zeros(1, dtype=torch.int64)

    def three(*shape: int, dtype: torch.dtype = dtype) -> surround.Three:
        q, k, v = (torch.empty(shape, dtype=dtype) for _ in range(3))
        return q, k, v

    def heads_of(tokens: int) -> surround.Three:
        return three(1, tokens, channels)

    weights, states = three(channels, 1, 4), three(1, channels, 4)
    none: surround.Three = (None, None, None)
    past = torch.zeros(length, dtype=torch.uint8)
    for held, before, seen in ((states, None, lengths), (none, past, None)):
        parts = surround.Parts(heads_of(length), weights, held, before, seen, dim)
        surround.convolve(parts)
        surround.convolve_backward(parts, heads_of(length), True, True)

    decay = (torch.empty(heads), torch.empty(heads))
    given = surround.GateInputs(*three(1, length, heads), *decay, None, 1e-6)
    surround.gates(given)
    surround.gates_backward(given, three(1, length, heads, dtype=torch.float32))
    o, weight = torch.empty(1, length, heads, dim, dtype=dtype), torch.empty(dim, dtype=dtype)
    surround.gated_norm(o, o, weight, 1e-6)
    surround.gated_norm_backward(o, o, weight, o, 1e-6)
    for tokens in (1, 16):
        parts = surround.Parts(heads_of(tokens), weights, states, None, lengths, dim)
        surround.step(parts, surround.GateInputs(*three(1, tokens, heads), *decay, lengths, 1e-6))
    run_ends(dim, dtype)


def run_ends(dim: int, dtype: torch.dtype) -> None:
    """Launch both kernels of end states."""
    some = problem(dim, dtype)
    inputs = EndInputs(some.k, some.v, some.g, None, some.beta, some.k.shape[2], True, True)
    found = ends.end_states(inputs)
    assert found.h is not None
    after, states = (found.after_u, found.after_h), (found.u, found.h)
    ends.end_states_backward(inputs, after, states, (None, None))


def usage(name: str, kernel, arch: int) -> Usage:
    registers, spills = _assemble(kernel.asm["ptx"], arch)
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    blocks = _blocks(registers, shared, warps, arch)
    return Usage(name, warps, registers, spills, shared, blocks)


def usage_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (nearly all spills) per thread, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", told)[0]
    return int(found[0]), int(found[1])


def hopper_usages(dim: int, dtype: str) -> Iterator[Usage]:
    """The CUDA C++ kernels for heads of `dim`, compiled by NVRTC; empty without NVRTC or such kernels."""
    if dim not in build.DIMS or dtype == "float32" or nvrtc.why_missing() is not None:
        return
    for kernel in ("forward", "adjoint", *build.SCANS):
        for solver in get_args(SolverName) if kernel in build.SOLVES else ("chebyshev",):
            source = build.source(kernel, dim, dim, dtype == "bfloat16", solver)
            registers, stack = usage_of_cubin(build.compile_cubin(source, kernel))
            warps = build.threads_of(kernel, dim) // 32
            shared = build.shared_bytes(kernel, dim, dim)
            name = f"hopper {kernel}{'' if solver == 'chebyshev' else f' {solver}'}"
            yield Usage(
                name, warps, registers, stack, shared, _blocks(registers, shared, warps, 90)
            )


def _blocks(registers: int, shared: int, warps: int, arch: int) -> int:
    """Number of blocks that fit on a multiprocessor."""
    return min(
        REGISTERS // (registers * 32 * warps),
        (SHARED_OF_PROCESSOR[arch] * 1024) // (shared + 1024),
        64 // warps if arch in (80, 90) else 48 // warps,
    )


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores, from ptxas."""
    target = re.findall(r"\.target (sm_\w+)", ptx)[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.findall(r"Used (\d+) registers", told)
    return int(registers[0]), int(re.findall(r"(\d+) bytes spill stores", told)[0])


def compile_all(arch: int, dim: int, dtype: str, run: Callable[..., None]) -> list:
    """(name, compiled kernel) of all kernels that `run` launches."""
    with compiling_only(arch) as compiled:
        run(dim, getattr(torch, dtype))
    return compiled


def run_solvers(dim: int, dtype: torch.dtype) -> None:
    """Launch both passes of the op and a decoding step with each solver."""
    for solver in SOLVERS:
        plan.plan_of.cache_clear()  # a compiled kernel would be launched
        run_all(dim, dtype, solver)
        run_step(dim, dtype, solver)


def shared_table(arch: int, dim: int, dtype: str, run: Callable) -> None:
    """Print each kernel's shared memory and the chip's limit, in bytes."""
    for name, kernel in compile_all(arch, dim, dtype, run):
        print(arch, dim, dtype, name, kernel.metadata.shared, SHARED_LIMITS[arch], flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--shared", action="store_true", help="only shared memory")
    parser.add_argument(
        "--around", action="store_true", help="only the kernels around the op in a layer"
    )
    args = parser.parse_args(arguments)
    run = run_around if args.around else run_solvers
    if args.shared:
        if "TRITON_CACHE_DIR" not in os.environ:
            parser.error("--shared needs TRITON_CACHE_DIR: a directory to be thrown away.")
        CUDABackend.make_cubin = lambda *_: b""  # pyright: ignore[reportAttributeAccessIssue]
        for case in itertools.product(args.arch, args.dims, args.dtypes):
            shared_table(*case, run)
        return
    print("| sm | dtype | K = V | kernel | warps | registers | spills | shared | blocks an SM |")
    print("|---" * 9 + "|")
    for arch in args.arch:
        for dtype in args.dtypes:
            for dim in args.dims:
                compiled = compile_all(arch, dim, dtype, run)
                used = dict.fromkeys(usage(name, kernel, arch) for name, kernel in compiled)
                for u in (
                    *used,
                    *(hopper_usages(dim, dtype) if arch == 90 and not args.around else ()),
                ):
                    print(
                        f"| {arch} | {dtype} | {dim} | {u.name} | {u.warps} | {u.registers} "
                        f"| {u.spills} | {u.shared} | {u.blocks} |",
                        flush=True,
                    )
