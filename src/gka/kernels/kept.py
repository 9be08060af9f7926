"""States at chunk starts that a forward pass keeps for its backward pass, which then need not scan again.

They are one array, uint8 [chunks, bytes of a chunk]: an operator's result whose shape follows from the
inputs' shapes. Sections follow one another in it, each for all chunks: h_start, its scales and norms,
u_start and its scales, the largest keys and values.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gka.kernels.arrays import Maxima, Moments
from gka.kernels.call import GpuCall, Sizes
from gka.maths.chunked import Settings, Tokens

ALIGNMENT = 256  # bytes, of a section

Section = tuple[tuple[int, ...], torch.dtype]  # shape of one chunk's part


class KeptStates(NamedTuple):
    """Views of the kept array: H (None if it is not formed), U, and the largest keys and values."""

    h: Moments | None
    u: Moments
    k_maxima: Tensor
    v_maxima: Tensor

    def maxima(self, call: GpuCall) -> Maxima:
        """The kept maxima, with scratch for those of the backward pass."""
        shape = (call.M, call.H)
        z, d = call.scratch("max z", *shape), call.scratch("max do", *shape, call.NV)
        return Maxima(k=self.k_maxima, v=self.v_maxima, z=z, d=d)


@lru_cache(maxsize=64)
def _sections(sizes: Sizes, with_h: bool) -> dict[str, Section]:
    heads, (K, V), (NK, NV) = sizes.heads[0], sizes.dims, sizes.blocks
    number, op = torch.float32, sizes.op_dtype
    of_h: dict[str, Section] = {
        "h_start": ((heads, K, K), op),
        "h_scales": ((heads, NK), number),
        "h_norms": ((heads, NK), number),
    }
    return (of_h if with_h else {}) | {
        "u_start": ((heads, K, V), op),
        "u_scales": ((heads, NV), number),
        "k_maxima": ((heads,), number),
        "v_maxima": ((heads, NV), number),
    }


def _bytes(section: Section) -> int:
    """Bytes of a chunk's part, so many that every section is aligned."""
    shape, dtype = section
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def kept_shape(t: Tokens, settings: Settings) -> tuple[int, int]:
    """Chunks and bytes of a chunk.

    Of packed sequences it is the largest number of chunks that so many sequences of so many tokens can have.
    """
    batch, length, heads, key_dim = t.q.shape
    if t.cu_seqlens is None:
        chunks = batch * -(-length // settings.chunk_size)
    else:
        chunks = length // settings.chunk_size + t.cu_seqlens.shape[0] - 1
    counts, dims = (heads, t.k.shape[2], t.v.shape[2]), (key_dim, t.v.shape[-1])
    # neither device nor chip matters here
    sizes = Sizes(counts, dims, t.q.dtype, settings.chunk_size, torch.device("cpu"), (0, 0))
    sections = _sections(sizes, settings.num_iter > 0 or settings.with_h)
    return chunks, sum(map(_bytes, sections.values()))


def kept_states(call: GpuCall, kept: Tensor, final: bool) -> KeptStates:
    """The states in `kept`, an array of `kept_shape`; a recording finds their addresses in it.

    Args:
        final: whether there is memory for final states.
    """
    with_h = call.solves or call.settings.with_h
    views, rows, flat, begin = {}, kept.shape[0], kept.view(-1), 0
    for name, (shape, dtype) in _sections(call.sizes, with_h).items():
        count = call.M * prod(shape) * dtype.itemsize
        view = flat[begin : begin + count].view(dtype).view(call.M, *shape)
        call.views.append((view, kept, begin))
        views[name], begin = view, begin + rows * _bytes((shape, dtype))
    call.kept = kept

    def moments(name: str, width: int, norms: Tensor) -> Moments:
        last = call.empty(call.N, call.H, call.K, width) if final else None
        return Moments(views[f"{name}_start"], views[f"{name}_scales"], norms, last)

    return KeptStates(
        h=moments("h", call.K, views["h_norms"]) if with_h else None,
        u=moments("u", call.V, call.scratch("u norms", call.M, call.H, call.NV)),
        k_maxima=views["k_maxima"],
        v_maxima=views["v_maxima"],
    )
