"""The backends on NVIDIA GPUs: what they can run, and their kernels, which are imported on first use."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import get_args

import torch
from torch import Tensor

from gka.maths.adjoint import Gradients
from gka.maths.chebyshev import Solver
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.recurrent import States
from gka.ops.backend_types import Backend, Call, Stepper


def _no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed."
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, slow); got {device}."
    return None


def _triton_refusal(call: Call) -> str | None:
    reason = _no_triton(call.device)
    if reason is not None:
        return reason
    from gka.kernels import configs

    narrow = configs.widest_certificate(call.dtype == torch.float32, call.device)
    if call.solver == "adaptive" and call.dims[0] > narrow:
        return (
            f"its adaptive solver takes float32 keys up to {narrow} wide (a certificate of wider ones "
            f"outgrows the shared memory); got {call.dims[0]}."
        )
    return configs.why_not(call.device, call.dtype, call.dims, call.chunk_size)


def _hopper_refusal(call: Call) -> str | None:
    if importlib.util.find_spec("triton") is None:  # runs num_iter = 0, which has no solve
        return "the package triton is not installed."
    from gka.kernels import hopper

    return hopper.why_not(call.device, call.dtype, call.dims, call.chunk_size)


def _triton_step_refusal(call: Call) -> str | None:
    reason = _no_triton(call.device)
    if reason is not None:
        return reason
    from gka.kernels import configs

    # chunks and operands of matrix products are no matter here
    return configs.why_not(call.device, torch.bfloat16, call.dims, 64) or _not_float64(call)


def _not_float64(call: Call) -> str | None:
    double = call.dtype == torch.float64
    return "its kernels compute in float32 at best; got float64." if double else None


def _hopper_step_refusal(call: Call) -> str | None:
    if importlib.util.find_spec("triton") is None:  # advances states
        return "the package triton is not installed."
    from gka.kernels.hopper import recurrent

    return recurrent.why_not(call.device, call.dims) or _not_float64(call)


def _current(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device: inside, the inputs' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on_gpu(on_hopper: bool) -> tuple[Callable[..., Forward], Callable[..., Gradients]]:
    """Forward and backward of the kernels; the modules that import triton are loaded on first use."""

    def forward(tokens: Tokens, settings: Settings) -> Forward:
        from gka.kernels import launch

        with _current(tokens.q.device):
            return launch.chunk_forward(tokens, settings, on_hopper)

    def backward(tokens: Tokens, *args) -> Gradients:
        from gka.kernels import launch

        with _current(tokens.q.device):
            return launch.chunk_backward(tokens, *args, on_hopper=on_hopper)

    return forward, backward


def _recurrent_on_gpu(on_hopper: bool) -> tuple[Callable[..., Forward], Callable, Callable]:
    """Mode "recurrent", step and advance of the kernels."""

    def forward(tokens: Tokens, settings: Settings) -> Forward:
        from gka.kernels import recurrent_launch as launch

        with _current(tokens.q.device):
            return launch.forward(tokens, settings, on_hopper)

    def step(tokens: Tokens, settings: Settings, states: States, commit: bool) -> Tensor:
        from gka.kernels import recurrent_launch as launch

        with _current(tokens.q.device):
            return launch.step(tokens, settings, states, commit, on_hopper=on_hopper)

    def advance(tokens: Tokens, settings: Settings, states: States, counts: Tensor) -> None:
        from gka.kernels import recurrent_launch as launch

        with _current(tokens.q.device):
            launch.advance(tokens, settings, states, counts)

    return forward, step, advance


def _backend(
    name: str,
    refusal: Callable[[Call], str | None],
    step_refusal: Callable[[Call], str | None],
    solvers: tuple[Solver, ...],
) -> Backend:
    on_hopper = name == "hopper"
    forward, backward = _on_gpu(on_hopper)
    recurrent, step, advance = _recurrent_on_gpu(on_hopper)
    return Backend(
        name=name,
        forward={"chunk": forward, "recurrent": recurrent},
        backward=backward,
        refusal=refusal,
        automatic=lambda device: device.type == "cuda",  # interpreted only if asked for by name
        scaled_dtype=lambda dtype: torch.float32 if dtype == torch.float32 else torch.float16,
        solvers=solvers,
        stepper=Stepper(step, advance, step_refusal),
    )


TRITON = _backend("triton", _triton_refusal, _triton_step_refusal, get_args(Solver))
HOPPER = _backend("hopper", _hopper_refusal, _hopper_step_refusal, get_args(Solver))
