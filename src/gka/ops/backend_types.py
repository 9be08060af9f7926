"""What a backend is: the implementations behind the custom operators, and the calls they may refuse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gka.maths.adjoint import Gradients
from gka.maths.chebyshev import Solver
from gka.maths.chunked import Forward, Settings, Tokens
from gka.maths.recurrent import States

Mode = Literal["chunk", "recurrent"]
# "step": the ops that update states in place
AnyMode = Literal["chunk", "recurrent", "step"]


@dataclass(frozen=True)
class Call:
    """What a backend must know of a call to tell whether it can run it.

    Attributes:
        dims: K and V.
        chunk_size: C.
        mode: "step" for the ops that update states in place.
    """

    device: torch.device
    dtype: torch.dtype
    solver: Solver = "chebyshev"
    dims: tuple[int, int] = (128, 128)
    chunk_size: int = 64
    mode: AnyMode = "chunk"


@dataclass(frozen=True)
class Stepper:
    """What a backend has for the ops that update states in place; all of them have every solver.

    Attributes:
        step: `maths.recurrent.step_` without x.
        advance: `maths.recurrent.advance_`.
        refusal: why it cannot run a call; None if it can.
    """

    step: Callable[[Tokens, Settings, States, bool], Tensor]
    advance: Callable[[Tokens, Settings, States, Tensor], None]
    refusal: Callable[[Call], str | None]


@dataclass(frozen=True)
class Backend:
    """A set of compiled or plain implementations behind the custom operators.

    Attributes:
        name: as users give it.
        forward: implementation of each mode.
        backward: the derivative, shared by the modes, since they compute the same map. Takes the
            tokens, the solutions x and their scales as a forward left them, the gradients of o and
            of the final states, and the settings.
        refusal: why the backend cannot run a call; None if it can.
        automatic: whether backend="auto" may choose it on a device.
        scaled_dtype: dtype in which mode "chunk" keeps x for inputs of a dtype, rows divided by
            their scale; None where x is kept in the working precision, without scales.
        solvers: the solvers it has.
        stepper: for states in place; None: it has no such kernels.
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
    refusal: Callable[["Call"], str | None]
    automatic: Callable[[torch.device], bool] = lambda device: True
    scaled_dtype: Callable[[torch.dtype], torch.dtype] | None = None
    solvers: tuple[Solver, ...] = ("chebyshev",)
    stepper: Stepper | None = None
