"""Which implementation runs a call: chosen explicitly, queryable, never silently another one."""

import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gka.maths.adjoint import Gradients, chunk_backward
from gka.maths.chebyshev import Solver
from gka.maths.chunked import Forward, Settings, Tokens, chunk_forward
from gka.maths.recurrent import recurrent_forward

Mode = Literal["chunk", "recurrent"]

_ran = threading.local()


@dataclass(frozen=True)
class Backend:
    """A set of compiled or plain implementations behind the custom operators.

    Attributes:
        name: as users give it.
        forward: implementation of each mode.
        backward: the derivative, shared by the modes, since they compute the same map. Takes the
            tokens, the solutions x and their scales as a forward left them, the gradients of o and
            of the final states, and the settings.
        refusal: why the backend cannot run a call on tokens like these; None if it can.
        automatic: whether backend="auto" may choose it.
        scaled_dtype: dtype in which mode "chunk" keeps x for inputs of a dtype, rows divided by
            their scale; None where x is kept in the working precision, without scales.
        solvers: the solvers it has.
    """

    name: str
    forward: dict[Mode, Callable[[Tokens, Settings], Forward]]
    backward: Callable[
        [
            Tokens,
            Tensor | None,
            Tensor | None,
            Tensor,
            Tensor | None,
            Tensor | None,
            Settings,
        ],
        Gradients,
    ]
    refusal: Callable[[torch.device, torch.dtype], str | None]
    automatic: bool = True
    scaled_dtype: Callable[[torch.dtype], torch.dtype] | None = None
    solvers: tuple[Solver, ...] = ("chebyshev",)


# In order of preference for backend="auto".
_BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend, *, first: bool = False) -> None:
    """Add a backend; `first` puts it before the others for backend="auto"."""
    global _BACKENDS
    others = {name: b for name, b in _BACKENDS.items() if name != backend.name}
    mine = {backend.name: backend}
    _BACKENDS = mine | others if first else others | mine


def _torch_backward(tokens: Tokens, x: Tensor | None, x_scale: Tensor | None, *rest) -> Gradients:
    return chunk_backward(tokens, x, *rest)


register_backend(
    Backend(
        name="torch",
        forward={"chunk": chunk_forward, "recurrent": recurrent_forward},
        backward=_torch_backward,
        refusal=lambda device, dtype: None,
        solvers=get_args(Solver),
    )
)


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed."
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, slow); got {device}."
    if dtype == torch.float64:
        return "its kernels compute in float32 at best; got float64."
    return None


def _triton_forward(tokens: Tokens, settings: Settings) -> Forward:
    from gka.kernels import launch  # imports triton

    return launch.chunk_forward(tokens, settings)


def _triton_backward(*args) -> Gradients:
    from gka.kernels import launch

    return launch.chunk_backward(*args)


# Not automatic: its kernels are right on a GPU but not yet as well proved, nor as fast, as they must be.
register_backend(
    Backend(
        name="triton",
        forward={"chunk": _triton_forward, "recurrent": recurrent_forward},
        backward=_triton_backward,
        refusal=_triton_refusal,
        automatic=False,
        scaled_dtype=lambda dtype: torch.float32 if dtype == torch.float32 else torch.float16,
    )
)


def get_backend(name: str) -> Backend:
    return _BACKENDS[name]


def known_backends() -> tuple[str, ...]:
    """Names a call accepts."""
    return ("auto", *_BACKENDS, "reference")


def why_unavailable(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    solver: Solver = "chebyshev",
) -> str | None:
    """Why `name` cannot run inputs of this device and dtype with this solver; None if it can.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in known_backends():
        raise ValueError(f"backend must be one of {', '.join(known_backends())}; got {name!r}.")
    if name == "auto":
        return None
    solvers = ("chebyshev",) if name == "reference" else _BACKENDS[name].solvers
    if solver not in solvers:
        return f"it has no solver={solver!r}, only {', '.join(solvers)}."
    if name == "reference":
        return None
    return _BACKENDS[name].refusal(torch.device(device), dtype)


def available_backends(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    solver: Solver = "chebyshev",
) -> list[str]:
    """Backends that can run such inputs with this solver, the one "auto" takes first."""
    ordered = sorted(_BACKENDS, key=lambda name: not _BACKENDS[name].automatic)
    names = [*ordered, "reference"]
    return [name for name in names if why_unavailable(name, device, dtype, solver) is None]


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, solver: Solver = "chebyshev"
) -> str:
    """The backend that `name` means here.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    reason = why_unavailable(name, device, dtype, solver)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot run this call: {reason} "
            f"Available here: {', '.join(available_backends(device, dtype, solver))}."
        )
    return available_backends(device, dtype, solver)[0] if name == "auto" else name


def note_backend(name: str) -> None:
    _ran.name = name


def last_backend() -> str | None:
    """Name of the backend that ran this thread's most recent forward or backward; None before any."""
    return getattr(_ran, "name", None)
