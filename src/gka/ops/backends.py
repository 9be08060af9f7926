"""Which implementation runs a call: chosen explicitly, queryable, never silently another one."""

import operator
import threading
from typing import get_args

import torch
from torch import Tensor

from gka.maths.adjoint import Gradients, chunk_backward
from gka.maths.chebyshev import Solver
from gka.maths.chunked import Tokens, chunk_forward
from gka.maths.recurrent import advance_, recurrent_forward, step_
from gka.ops.backend_types import AnyMode, Backend, Call, Stepper
from gka.ops.gpu_backends import HOPPER, TRITON

_ran = threading.local()

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
        refusal=lambda call: None,
        solvers=get_args(Solver),
        stepper=Stepper(step_, advance_, lambda call: None),
    )
)
register_backend(TRITON, first=True)
register_backend(HOPPER, first=True)


def get_backend(name: str) -> Backend:
    return _BACKENDS[name]


def known_backends() -> tuple[str, ...]:
    """Names a call accepts."""
    return ("auto", *_BACKENDS, "reference")


def _why_not(name: str, call: Call) -> str | None:
    if name == "auto":
        return None
    if call.mode == "step":
        stepper = None if name == "reference" else _BACKENDS[name].stepper
        return "it updates no states in place." if stepper is None else stepper.refusal(call)
    solvers = ("chebyshev",) if name == "reference" else _BACKENDS[name].solvers
    if call.solver not in solvers:
        return f"it has no solver={call.solver!r}, only {', '.join(solvers)}."
    return None if name == "reference" else _BACKENDS[name].refusal(call)


def _check_known(name: str) -> None:
    if name not in known_backends():
        raise ValueError(f"backend must be one of {', '.join(known_backends())}; got {name!r}.")


def why_unavailable(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    solver: Solver = "chebyshev",
    dims: tuple[int, int] = (128, 128),
    chunk_size: int = 64,
    mode: AnyMode = "chunk",
) -> str | None:
    """Why `name` cannot run inputs of this device, dtype and K, V = `dims` with this solver; None if it can.

    mode="step" asks for the ops that update states in place.

    Raises:
        ValueError: no backend has that name.
    """
    _check_known(name)
    return _why_not(name, Call(torch.device(device), dtype, solver, dims, chunk_size, mode))


def available_backends(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    solver: Solver = "chebyshev",
    dims: tuple[int, int] = (128, 128),
    chunk_size: int = 64,
    mode: AnyMode = "chunk",
) -> list[str]:
    """Backends that can run such inputs with this solver, the one "auto" takes first.

    mode="step" asks for the ops that update states in place.
    """
    return _available(Call(torch.device(device), dtype, solver, dims, chunk_size, mode))


def _available(call: Call) -> list[str]:
    ordered = sorted(_BACKENDS, key=lambda name: not _BACKENDS[name].automatic(call.device))
    return [name for name in (*ordered, "reference") if _why_not(name, call) is None]


def resolve_backend(name: str, call: Call) -> str:
    """The backend that `name` means for a call; a constant to torch.compile, which does not look inside.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    _check_known(name)
    c = call
    # as plain integers: of symbolic ones torch.compile knows no constant
    key_dim, value_dim = operator.index(c.dims[0]), operator.index(c.dims[1])
    return _resolve(name, c.device, c.dtype, c.solver, key_dim, value_dim, c.chunk_size, c.mode)


# spelt out: of a dataclass Dynamo does not know that it is constant
@torch.compiler.assume_constant_result
def _resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    solver: Solver,
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


def last_backend() -> str | None:
    """Name of the backend that ran this thread's most recent forward or backward; None before any."""
    return getattr(_ran, "name", None)
