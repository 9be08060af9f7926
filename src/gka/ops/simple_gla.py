"""chunk_simple_gla: gated linear attention with one decay per head, by our kernels or a library's."""

from torch import Tensor

from gka.errors import InputError
from gka.ops.autograd import autocast
from gka.ops.chunk import check_call, run_call
from gka.ops.external import EXTERNAL, Given, resolve_external
from gka.ops.external_call import run_external


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention with a scalar decay per head: `chunk_gka` without its ridge.

    o_t = scale U_t^T q_t,  U_t = exp(g_t) U_{t-1} + k_t v_t^T.

    Arguments as in `chunk_gka`; the state is h_kv [N,H,K,V] alone, and H is never formed. `backend` may also
    be "fla", the kernels of flash-linear-attention where they are installed (`gka.ops.why_not_external`; 16
    bits, chunks of 64 tokens, no `beta`, no second derivative); "auto" takes them first where they can run.

    Raises:
        InputError (a ValueError): backend="fla" cannot run these inputs; the message says why.
    """
    library = _library(backend, q, k, v, g, beta, initial_state, chunk_size)
    if library is not None:
        checked = (q, k, v, g, None, None, None, initial_state, cu_seqlens, cu_seqlens_cpu)
        numbers = (scale, 1.0, 0, chunk_size, output_final_state, "chebyshev", False, "torch")
        _, settings = check_call(*checked, *numbers)
        q, k, v = autocast(q, k, v)
        given = Given(
            q, k, v, g, None, initial_state, cu_seqlens, settings.scale, output_final_state
        )
        return run_external(library, "simple_gla", given, cu_seqlens_cpu)
    o, final = run_call(
        "chunk", q, k, v, g, None, None, beta, scale=scale, ridge_ratio=1.0, num_iter=0,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu, backend=backend, chunk_size=chunk_size, with_h=False,
    )  # fmt: skip
    return o, None if final is None else final[1]


def _library(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> str | None:
    """The library that runs the call; None if `chunk_gka` does, which then checks it."""
    if backend in EXTERNAL and (beta is not None or chunk_size != 64):
        raise InputError(
            f"backend={backend!r} has chunks of 64 tokens and no write gate; got chunk_size={chunk_size}"
            f"{'' if beta is None else ' and beta'}."
        )
    known = (backend == "auto" and beta is None and chunk_size == 64) or backend in EXTERNAL
    if not known or not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return None
    q, k, v = autocast(q, k, v)
    wanted = [x for x in (k, g, state) if isinstance(x, Tensor)]
    return resolve_external(backend, "simple_gla", q, v, *wanted)
