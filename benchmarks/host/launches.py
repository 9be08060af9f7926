"""Time that the host needs to launch a call's kernels, without the launches themselves.

`python -m benchmarks.run host` needs no GPU: tensors are on the CPU, Triton's kernels are compiled for
Hopper (and cached) and launches do nothing. `--profile` shows where the time goes. On a GPU's host, the
driver and torch's CUDA allocator take additional time. Sequences are SHORTER times shorter, to keep torch's
own work on the CPU small, but have as many segments and groups of heads.
"""

import argparse
import cProfile
import ctypes
import functools
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.host.resources import as_if_on
from torch import Tensor
from triton.compiler import CompiledKernel

from gka.kernels import backward, driver, tables
from gka.kernels.hopper import build, nvrtc
from gka.ops import backends, chunk_gka

CALLS, WARM_UP = 200, 5
SHORTER = 16  # factor by which sequences are shorter


class _Processor:
    """Device properties that the launcher reads."""

    multi_processor_count = 132


class _Kernel(driver.Kernel):
    """A CUDA C++ kernel whose launch does nothing."""

    def __init__(self, cubin: bytes, name: str, threads: int, shared: int) -> None:
        pass

    def __call__(self, grid, arguments) -> None:
        pass

    def bind(self, grid) -> Callable[..., int]:
        return lambda *_: 0


def _load_nothing(kernel: CompiledKernel) -> None:
    kernel._run = lambda *args: None
    kernel.function = 0


@contextmanager
def launching_nothing(arch: int = 90) -> Iterator[None]:
    """In the block, the backends "triton" and "hopper" accept CPU tensors and do everything but launch."""
    registered = dict(backends._BACKENDS)
    with ExitStack() as stack:
        stack.enter_context(as_if_on(arch))
        for target, name, stub in (
            (CompiledKernel, "_init_handles", _load_nothing),
            (build, "Kernel", _Kernel),
            # Cached as on a GPU, where the tables of sequences of one length are kept.
            (tables, "_made", functools.cache(tables._made)),
            (tables, "SHORTEST_SEGMENT", 1),
            (backward, "CHUNK_HEADS", backward.CHUNK_HEADS // SHORTER),
            (nvrtc, "compile_cubin", lambda *args: b""),
            (torch.cuda, "get_device_properties", lambda device: _Processor),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (driver, "current_stream", lambda: ctypes.c_void_p(0)),
        ):
            stack.enter_context(patch.object(target, name, stub))
        for name in ("triton", "hopper"):
            backends.register_backend(replace(registered[name], refusal=lambda call: None))
        try:
            yield
        finally:
            backends._BACKENDS = registered


def layer_inputs(length: int, heads: int, dim: int) -> dict[str, Any]:
    """bfloat16 q, k, v and float32 gates, as in a layer; values do not matter."""
    shape = (1, length, heads, dim)
    made = {n: torch.zeros(shape, dtype=torch.bfloat16) for n in "qkv"}
    made |= {n: torch.zeros(shape[:3]) for n in ("g", "alpha", "beta")}
    return {name: x.requires_grad_() for name, x in made.items()}


def passes(backend: str, solver: str, length: int, heads: int, dim: int) -> dict[str, Callable]:
    """A forward pass without gradients, a forward pass with them, and its backward pass."""
    inputs = layer_inputs(length, heads, dim)
    gradient = torch.zeros(1, length, heads, dim, dtype=torch.bfloat16)

    def forward() -> Tensor:
        return chunk_gka(**inputs, gk=inputs["g"], backend=backend, solver=solver)[0]

    o = forward()

    def inference() -> Tensor:
        with torch.no_grad():
            return forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, list(inputs.values()), gradient, retain_graph=True)

    return {"inference": inference, "forward": forward, "backward": backward}


def microseconds(call: Callable) -> list[float]:
    """Microseconds of each of CALLS calls, after WARM_UP others."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


def profile(call: Callable) -> None:
    """Print where the host's time goes."""
    with cProfile.Profile() as found:
        for _ in range(CALLS):
            call()
    pstats.Stats(found).sort_stats("tottime").print_stats(35)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run host", description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["hopper", "triton"])
    parser.add_argument("--solver", default="chebyshev")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    with launching_nothing():
        for backend in args.backends:
            calls = passes(backend, args.solver, args.length // SHORTER, args.heads, args.dim)
            for name, call in calls.items():
                low, median, high = statistics.quantiles(microseconds(call), n=4)
                print(f"{backend} {name}: {median:.0f} us (quartiles {low:.0f}, {high:.0f})")
                if args.profile:
                    profile(call)
