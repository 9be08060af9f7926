"""The CUDA C++ kernels compile for Hopper within what a multiprocessor holds (NVRTC; no GPU needed)."""

import ctypes
import importlib
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from gka.kernels.hopper import build, nvrtc
from gka.kernels.hopper.arguments import StepArguments
from gka.kernels.hopper.build import SOLVES
from gka.maths.solvers import SolverName
from quick import quick_first

pytest.importorskip("triton", reason="its cuobjdump reads what a kernel takes")
pytestmark = pytest.mark.skipif(
    nvrtc.why_missing() is not None, reason=f"no NVRTC: {nvrtc.why_missing()}"
)
SHARED = 227 * 1024  # bytes of a multiprocessor that blocks can have
RESERVED = 1024  # of them each block's own
REGISTERS = 65536
STACK = (
    320  # bytes a thread: spilled registers, none in a loop; the most is 304 (adjoint, adaptive)
)
# every kernel at both widths, all solvers, both 16-bit dtypes, and mixed dims: about 40 s on a core
CASES = [
    *((kernel, dims, solver, True) for kernel in SOLVES for dims in ((64, 64), (128, 128))
      for solver in get_args(build.Solve)),
    *((kernel, dims, "chebyshev", True) for kernel in ("gradients", *build.SCANS)
      for dims in ((64, 64), (128, 128))),
    *((kernel, dims, "adaptive" if kernel in SOLVES else "chebyshev", False)
      for kernel in (*SOLVES, "gradients", *build.SCANS) for dims in ((64, 128), (128, 64))),
]  # fmt: skip


VERBOSE = ("--ptxas-options=-v",)


def serialised(log: str) -> list[str]:
    """The assembler's notes C7510 to C7519: products made to wait for each other, or waits put in."""
    return [line for line in log.splitlines() if re.search(r"\(C751\d\)", line)]


def name_of(case: tuple) -> str:
    kernel, (key_dim, value_dim), solver, bfloat16 = case
    return f"{kernel}-{key_dim}-{value_dim}-{solver}{'' if bfloat16 else '-float16'}"


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("benchmarks.host.resources")


# both widths of bfloat16 with the solvers that differ most; the others are slow
QUICK = {case for case in CASES if case[3] and (case[0] not in SOLVES or case[1] == (128, 128))}


@pytest.mark.parametrize(
    "case", quick_first([(case,) for case in CASES], [(case,) for case in QUICK]), ids=name_of
)
def test_blocks_that_should_be_resident_fit(case: tuple, resources) -> None:
    """Registers and shared memory leave room for BLOCKS blocks of a chunk's kernels, two of the scans', next
    to nothing is spilled, and the assembler leaves warp-group products asynchronous. What a kernel keeps in
    shared memory, with 1023 bytes to align it, is within `shared_bytes` (combine.cu keeps nothing)."""
    kernel, dims, solver, bfloat16 = case
    source = build.source(kernel, dims[0], dims[1], bfloat16, solver)
    if not kernel.startswith("combine"):
        kept, limit = (
            "Tiles" if kernel == "gradients" else "Shared",
            build.shared_bytes(kernel, *dims),
        )
        source += (
            f'\nstatic_assert(sizeof({kept}) + 1023 <= {limit}, "shared_bytes is too small");\n'
        )
    cubin, log = nvrtc.compile_with_notes(source, kernel, "sm_90a", build.headers(), *VERBOSE)
    if solver != "cg, small ridge":  # rare, and the assembler makes its products wait
        assert not serialised(log), serialised(log)
    registers, stack = resources.usage_of_cubin(cubin)
    blocks = build.BLOCKS[max(dims)] if kernel in (*SOLVES, "gradients") else 2
    threads = build.threads_of(kernel, dims[0])
    assert registers * threads * blocks <= REGISTERS
    assert stack <= STACK
    assert blocks * (build.shared_bytes(kernel, *dims) + RESERVED) <= SHARED


def test_a_product_that_is_not_waited_for_is_noticed() -> None:
    """The assembler does tell, in the log that the test above reads: here of a wait taken out."""
    source, wait = (
        build.source("forward", 64, 64, True, "chebyshev"),
        "mma_wait<0>();\n    hold(residual);",
    )
    assert any(wait in text for text in build.headers().values())
    headers = {name: text.replace(wait, "") for name, text in build.headers().items()}
    _, log = nvrtc.compile_with_notes(source, "forward", "sm_90a", headers, *VERBOSE)
    assert serialised(log)


@pytest.mark.parametrize("name", build.headers())
def test_headers_include_what_they_use(name: str) -> None:
    """Each compiles by itself."""
    solvers: dict[str, build.Solve] = {"adaptive.cuh": "adaptive", "cg.cuh": "cg"}
    solver = solvers.get(name, "chebyshev")
    head = build.defines("scan_states", 64, 128, True, solver)
    source = f'{head}#include "{name}"\nextern "C" __global__ void nothing() {{}}\n'
    build.compile_cubin(source, "nothing")


def test_what_is_no_program_is_refused_with_the_log() -> None:
    """The error holds NVRTC's own words."""
    with pytest.raises(nvrtc.CompilationError, match=r"undefined_name"):
        nvrtc.compile_cubin("__global__ void f() { undefined_name(); }", "f", "sm_90a")


@pytest.mark.parametrize("dims", list(build.DECODE_BLOCKS), ids=str)
def test_blocks_of_the_token_kernel_fit(dims: tuple[int, int], resources) -> None:
    """The kernel that takes single tokens keeps H in registers but for some words, BLOCKS blocks a
    multiprocessor, and its structures are as Python lays them out."""
    size, shared = ctypes.sizeof(StepArguments), build.step_shared_bytes(dims)
    for solver in get_args(SolverName):
        source = build.step_source(dims, torch.bfloat16, torch.bfloat16, solver)
        source += (
            f"\nstatic_assert(sizeof(StepArguments) == {size} && sizeof(Shared) <= {shared});\n"
        )
        registers, stack = resources.usage_of_cubin(build.compile_cubin(source, "step"))
        assert registers * dims[0] * build.DECODE_BLOCKS[dims] <= REGISTERS
        assert stack <= 96
        assert build.DECODE_BLOCKS[dims] * (shared + RESERVED) <= SHARED
