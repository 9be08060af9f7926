"""The forward pass on a GPU: scan, solve and readout."""

from typing import Any

import torch
from torch import Tensor

from gka.kernels.arrays import Moments
from gka.kernels.call import GpuCall, packed_chunks, prepared
from gka.kernels.kept import kept_shape, kept_states
from gka.kernels.passes import Executor, Passes, execute
from gka.kernels.replay import Ran, Recordings, apart, kind_of
from gka.maths.chunked import Forward, ScannedStates, Settings, Tokens

RECORDINGS = Recordings()


def chunk_forward(passes: Passes, tokens: Tokens, settings: Settings) -> Forward:
    """`gka.maths.chunked.chunk_forward` on the GPU. Rows of x are divided by `x_scale`."""
    t = prepared(tokens, passes.float_gates)
    chunks = None if t.cu_seqlens is None else packed_chunks(passes, t, settings)
    tables = () if chunks is None else chunks.tables
    kind = kind_of(passes, t, settings, chunks)
    if kind is None:
        return Forward(*_run(passes, GpuCall(passes, t, settings, chunks), execute))

    def record(execute: Executor) -> Ran:
        call = GpuCall(passes, apart(t), settings, chunks)
        return Ran(call, (*call.t.inputs, *tables), _run(passes, call, execute))

    return Forward(*RECORDINGS.run(kind, (*t.inputs, *tables), record))


def _run(passes: Passes, call: GpuCall, execute: Executor) -> tuple[Any, ...]:
    """The fields of `Forward`."""
    t, (heads,) = call.t, call.groups
    kept = maxima = None
    if call.settings.keep_states:
        kept = call.empty(*kept_shape(t, call.settings), dtype=torch.uint8)
        states = kept_states(call, kept, final=True)
        h, u, maxima = states.h, states.u, states.maxima(call)
    else:
        h, u = call.moments(heads, call.solves or call.settings.with_h, final=True)
    x, x_scale = solutions = call.solutions()
    o = call.empty(*t.q.shape[:3], call.V, dtype=t.q.dtype)
    execute(passes.scan(call, heads, h, u, maxima))
    execute(passes.solve_and_readout(call, heads, h, u, solutions, o))
    return o, x, None if h is None else h.final, u.final, x_scale, kept


def chunk_steps(passes: Passes, tokens: Tokens, settings: Settings) -> Tensor:
    """Steps that "adaptive" or "cg" takes in each token's chunk, int64 [B,T,H], as in `chunk_forward`."""
    call = GpuCall(passes, tokens, settings)
    (heads,) = call.groups
    h, u = call.moments(heads, with_h=True, final=False)
    assert h is not None
    steps = call.empty(call.M, call.H, dtype=torch.int32)
    # With maxima and without final states, as in the backward pass, whose compiled kernel is reused.
    execute(passes.scan(call, heads, h, u, call.maxima(heads)))
    execute(passes.count_steps(call, heads, h, u, steps))
    batch, length = tokens.q.shape[:2]
    chunk = torch.repeat_interleave(call.chunks.length.long(), output_size=batch * length)
    return steps[chunk].long().view(batch, length, call.H)


def chunk_states(passes: Passes, tokens: Tokens, settings: Settings) -> ScannedStates:
    """`gka.maths.chunked.chunk_states` on the GPU: the scan alone, its stored states in float32."""
    call = GpuCall(passes, tokens, settings)
    (heads,) = call.groups
    h, u = call.moments(heads, with_h=True, final=True)
    execute(passes.scan(call, heads, h, u, None))
    assert h is not None and h.final is not None and u.final is not None
    _, columns, value_columns = call.sizes.tiles
    return ScannedStates(_widened(h, columns), _widened(u, value_columns), h.final, u.final)


def _widened(moments: Moments, columns: int) -> Tensor:
    """S_[c] [M,H,K,width] from what is stored, each block of `columns` divided by its scale."""
    width = moments.start.shape[-1]
    scales = moments.scales.repeat_interleave(columns, -1)[..., :width]
    return moments.start.float() * scales.unsqueeze(-2)
