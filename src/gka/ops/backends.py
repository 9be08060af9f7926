"""Backends: what they are, which exist, and which of them runs a call.

A backend is chosen by name or by "auto". One that cannot run a call says why, and is never silently replaced.
"""

import importlib.util
import operator
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from gka.kernels.kept import kept_shape
from gka.maths.adjoint import Gradients, chunk_backward
from gka.maths.chunked import (
    Forward,
    ScannedStates,
    Settings,
    Tokens,
    chunk_forward,
    chunk_states,
    token_steps,
)
from gka.maths.recurrent import States, advance_, recurrent_forward, step_
from gka.maths.solvers import SolverName

if TYPE_CHECKING:
    from gka.kernels.passes import Passes

Mode = Literal["chunk", "recurrent"]
# "step": the ops that update states in place
AnyMode = Literal["chunk", "recurrent", "step"]


@dataclass(frozen=True)
class Call:
    """The facts of a call by which a backend decides whether it can run it.

    Attributes:
        dims: K and V.
        chunk_size: C.
        mode: "step" for the ops that update states in place.
    """

    device: torch.device
    dtype: torch.dtype
    solver: SolverName = "chebyshev"
    dims: tuple[int, int] = (128, 128)
    chunk_size: int = 64
    mode: AnyMode = "chunk"


@dataclass(frozen=True)
class Stepper:
    """A backend's implementation of the ops that update states in place; it has the backend's solvers.

    Attributes:
        step, advance: `maths.recurrent.step_` without x, and `advance_`.
        refusal: returns why it cannot run a call; None if it can.
    """

    step: Callable[[Tokens, Settings, States, bool], Tensor]
    advance: Callable[[Tokens, Settings, States, Tensor], None]
    refusal: Callable[[Call], str | None]


@dataclass(frozen=True)
class Backend:
    """An implementation of the custom operators.

    Attributes:
        name: the name that users pass.
        forward: implementation of each mode.
        backward: the derivative, the same for all modes, since they compute the same map. Takes the
            tokens, the forward pass's solutions x and their scales, the gradients of o and of the final
            states, the settings, and the states that the forward pass kept, or None.
        refusal: why the backend cannot run a call; None if it can.
        automatic: whether backend="auto" may choose it on a device.
        scaled_dtype: dtype in which mode "chunk" stores x for inputs of a dtype, rows divided by their
            scales; None if x is stored in the working precision, without scales.
        solvers: names of its solvers.
        stepper: its ops on states in place; None if it has none.
        steps, states: `maths.chunked.token_steps` and `chunk_states`, of mode "chunk".
        kept_shape: of the states that mode "chunk" keeps for the backward pass; None: it keeps none.
    """

    name: str
    forward: dict[Mode, Callable[[Tokens, Settings], Forward]]
    backward: Callable[..., Gradients]
    refusal: Callable[["Call"], str | None]
    automatic: Callable[[torch.device], bool] = lambda device: True
    scaled_dtype: Callable[[torch.dtype], torch.dtype] | None = None
    solvers: tuple[SolverName, ...] = ("chebyshev",)
    stepper: Stepper | None = None
    steps: Callable[[Tokens, Settings], Tensor] = token_steps
    states: Callable[[Tokens, Settings], ScannedStates] = chunk_states
    kept_shape: Callable[[Tokens, Settings], tuple[int, int]] | None = None


def _torch_backward(tokens: Tokens, x: Tensor | None, x_scale: Tensor | None, *rest) -> Gradients:
    return chunk_backward(tokens, x, *rest[:-1])  # without kept states


TORCH = Backend(
    name="torch",
    forward={"chunk": chunk_forward, "recurrent": recurrent_forward},
    backward=_torch_backward,
    refusal=lambda call: None,
    solvers=get_args(SolverName),
    stepper=Stepper(step_, advance_, lambda call: None),
)


def _missing() -> str | None:
    missing = importlib.util.find_spec("triton") is None
    return "the package triton is not installed." if missing else None


def _no_triton(device: torch.device) -> str | None:
    reason = _missing()
    if reason is None and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"its kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, slow); got {device}."
    return reason


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
    from gka.kernels.hopper import build

    # num_iter = 0 has no solve and runs on Triton's kernels.
    return _missing() or build.why_not(call.device, call.dtype, call.dims, call.chunk_size)


def _triton_step_refusal(call: Call) -> str | None:
    reason = _no_triton(call.device)
    if reason is not None:
        return reason
    from gka.kernels import configs

    # decoding has no chunks and no matrix products: any chunk size and 16-bit dtype that pass will do
    return configs.why_not(call.device, torch.bfloat16, call.dims, 64) or _not_float64(call)


def _not_float64(call: Call) -> str | None:
    double = call.dtype == torch.float64
    return "its kernels compute in float32 at best; got float64." if double else None


def _hopper_step_refusal(call: Call) -> str | None:
    from gka.kernels.hopper import build

    # states are advanced by Triton's kernel
    return _missing() or build.why_not_step(call.device, call.dims) or _not_float64(call)


def _triton(settings: Settings) -> "Passes":
    from gka.kernels.triton.passes import TRITON as passes

    return passes


def _hopper(settings: Settings) -> "Passes":
    """Hopper's passes, or Triton's for calls without a solve, which Hopper's kernels always contain."""
    return _hopper_decode(settings) if settings.num_iter > 0 else _triton(settings)


def _hopper_decode(settings: Settings) -> "Passes":
    from gka.kernels.hopper.passes import HOPPER as passes

    return passes


def current(device: torch.device) -> AbstractContextManager:
    """Makes the inputs' device the current one, to which launches go."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on_gpu(
    name: str,
    passes: Callable[[Settings], "Passes"],
    decode_passes: Callable[[Settings], "Passes"],
    refusal: Callable[[Call], str | None],
    step_refusal: Callable[[Call], str | None],
) -> Backend:
    """A GPU backend, which has every solver; the modules that import triton are loaded on first use."""

    def forward(tokens: Tokens, settings: Settings) -> Forward:
        from gka.kernels.forward import chunk_forward

        with current(tokens.q.device):
            return chunk_forward(passes(settings), tokens, settings)

    def backward(tokens: Tokens, *args) -> Gradients:
        from gka.kernels.backward import chunk_backward

        with current(tokens.q.device):
            return chunk_backward(passes(args[-2]), tokens, *args)

    def recurrent(tokens: Tokens, settings: Settings) -> Forward:
        from gka.kernels.decode import recurrent_forward

        with current(tokens.q.device):
            return recurrent_forward(decode_passes(settings), tokens, settings)

    def step(tokens: Tokens, settings: Settings, states: States, commit: bool) -> Tensor:
        from gka.kernels import decode

        with current(tokens.q.device):
            return decode.step(decode_passes(settings), tokens, settings, states, commit)

    def advance(tokens: Tokens, settings: Settings, states: States, counts: Tensor) -> None:
        from gka.kernels import decode

        with current(tokens.q.device):
            decode.advance(decode_passes(settings), tokens, settings, states, counts)

    def steps(tokens: Tokens, settings: Settings) -> Tensor:
        from gka.kernels.forward import chunk_steps

        with current(tokens.q.device):
            return chunk_steps(passes(settings), tokens, settings)

    def states(tokens: Tokens, settings: Settings) -> ScannedStates:
        from gka.kernels.forward import chunk_states

        with current(tokens.q.device):
            return chunk_states(passes(settings), tokens, settings)

    return Backend(
        name=name,
        forward={"chunk": forward, "recurrent": recurrent},
        backward=backward,
        refusal=refusal,
        automatic=lambda device: device.type == "cuda",  # interpreted kernels only by name
        scaled_dtype=lambda dtype: torch.float32 if dtype == torch.float32 else torch.float16,
        solvers=get_args(SolverName),
        stepper=Stepper(step, advance, step_refusal),
        steps=steps,
        states=states,
        kept_shape=kept_shape,
    )


TRITON = _on_gpu("triton", _triton, _triton, _triton_refusal, _triton_step_refusal)
HOPPER = _on_gpu("hopper", _hopper, _hopper_decode, _hopper_refusal, _hopper_step_refusal)

_ran = threading.local()

_BACKENDS: dict[str, Backend] = {b.name: b for b in (HOPPER, TRITON, TORCH)}  # in "auto"'s order


def register_backend(backend: Backend, *, first: bool = False) -> None:
    """Add a backend; `first` puts it before the others for backend="auto"."""
    global _BACKENDS
    others = {name: b for name, b in _BACKENDS.items() if name != backend.name}
    mine = {backend.name: backend}
    _BACKENDS = mine | others if first else others | mine


def registered_backends() -> dict[str, Backend]:
    """All backends by name; a new object after each registration."""
    return _BACKENDS


def get_backend(name: str) -> Backend:
    return _BACKENDS[name]


def known_backends() -> tuple[str, ...]:
    """The values that backend= accepts."""
    return ("auto", *_BACKENDS, "reference")


def _why_not(name: str, call: Call) -> str | None:
    if name == "auto":
        return None
    backend = None if name == "reference" else _BACKENDS[name]
    if call.mode == "step" and (backend is None or backend.stepper is None):
        return "it updates no states in place."
    solvers = ("chebyshev",) if backend is None else backend.solvers
    if call.solver not in solvers:
        return f"it has no solver={call.solver!r}, only {', '.join(solvers)}."
    at_work = backend.stepper if backend and call.mode == "step" else backend
    return at_work.refusal(call) if at_work else None


def check_known(name: str) -> None:
    """Raises ValueError unless a backend has that name."""
    if name not in known_backends():
        raise ValueError(f"backend must be one of {', '.join(known_backends())}; got {name!r}.")


def why_unavailable(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    solver: SolverName = "chebyshev",
    dims: tuple[int, int] = (128, 128),
    chunk_size: int = 64,
    mode: AnyMode = "chunk",
) -> str | None:
    """Why `name` cannot run inputs of this device, dtype and K, V = `dims` with this solver; None if it can.

    mode="step" means the ops that update states in place.

    Raises:
        ValueError: no backend has that name.
    """
    check_known(name)
    return _why_not(name, Call(torch.device(device), dtype, solver, dims, chunk_size, mode))


def available_backends(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    solver: SolverName = "chebyshev",
    dims: tuple[int, int] = (128, 128),
    chunk_size: int = 64,
    mode: AnyMode = "chunk",
) -> list[str]:
    """Backends that can run such inputs with this solver, in the order of "auto".

    mode="step" means the ops that update states in place.
    """
    return _available(Call(torch.device(device), dtype, solver, dims, chunk_size, mode))


def _available(call: Call) -> list[str]:
    ordered = sorted(_BACKENDS, key=lambda name: not _BACKENDS[name].automatic(call.device))
    return [name for name in (*ordered, "reference") if _why_not(name, call) is None]


def resolve_backend(name: str, call: Call) -> str:
    """The name of the backend for a call, with "auto" resolved; a constant to torch.compile.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    check_known(name)
    c = call
    # as plain integers: symbolic ones would make the result no constant to torch.compile
    key_dim, value_dim = operator.index(c.dims[0]), operator.index(c.dims[1])
    return _resolve(name, c.device, c.dtype, c.solver, key_dim, value_dim, c.chunk_size, c.mode)


# separate arguments: Dynamo does not take a dataclass for a constant
@torch.compiler.assume_constant_result
def _resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    solver: SolverName,
    key_dim: int,
    value_dim: int,
    chunk_size: int,
    mode: AnyMode,
) -> str:
    call = Call(device, dtype, solver, (key_dim, value_dim), chunk_size, mode)
    reason = _why_not(name, call)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot run this call: {reason} "
            f"Available here: {', '.join(_available(call))}."
        )
    return _available(call)[0] if name == "auto" else name


def note_backend(name: str) -> None:
    _ran.name = name


def running_backend(name: str) -> Backend:
    """The backend of that name, recorded for `last_backend`."""
    _ran.name = name
    return _BACKENDS[name]


def last_backend() -> str | None:
    """Name of the backend that ran this thread's latest forward or backward; None before any."""
    return getattr(_ran, "name", None)
