"""One call of the op on a GPU: its prepared inputs, sizes, tables and scratch memory."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import lcm
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from gka.kernels import configs
from gka.kernels.arrays import Boundary, Heads, Maxima, Moments, Solutions
from gka.kernels.tables import Chunking, chunking
from gka.maths.chunked import Settings, Tokens
from gka.maths.solvers import cg


def op_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrix products' operands for inputs of `dtype`."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def limits(settings: Settings, operands: torch.dtype) -> tuple[int, float | None]:
    """The largest number of steps, and with conjugate gradients their `stop` for products of that dtype."""
    if settings.solver != "cg" or settings.num_iter == 0:
        return settings.num_iter, None
    return cg.limits(settings.ridge_ratio, settings.num_iter, operands)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; also the key under which compiled kernels are kept.

    Attributes:
        heads: H, HK and HV.
        dims: K and V.
        chunk_size: C.
        capability: the chip's. device: part of the key, since a compiled kernel belongs to one device.
    """

    heads: tuple[int, int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    chunk_size: int
    device: torch.device
    capability: tuple[int, int]

    @property
    def exact(self) -> bool:
        """Whether operands of matrix products are float32 instead of float16."""
        return self.op_dtype == torch.float32

    @cached_property
    def op_dtype(self) -> torch.dtype:
        return op_dtype(self.dtype)

    @cached_property
    def tiles(self) -> tuple[int, int, int]:
        """BK, BN, BV: K padded, columns of H and of U in a block."""
        key_dim, value_dim = (max(16, 1 << (dim - 1).bit_length()) for dim in self.dims)
        # 64 columns per tile: with 32, Triton 3.6 reads past its shared memory in through_u_kernel.
        return key_dim, min(64, key_dim), min(64, value_dim)

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """NK, NV: blocks of columns of H and of U."""
        (key_dim, value_dim), (_, columns, value_columns) = self.dims, self.tiles
        return -(-key_dim // columns), -(-value_dim // value_columns)


class Needs(Protocol):
    """What a call asks of the backend that runs it.

    Attributes:
        float_gates: whether its kernels read gates in float32 only.
        measures_boundaries: whether its scans need the largest entry of each boundary state.
        replays: whether its launches can be recorded (`gka.kernels.replay`).
    """

    replays: bool
    float_gates: bool
    measures_boundaries: bool

    def scan_programs(self, sizes: Sizes) -> int:
        """Programs per head that walk along each segment in a scan."""
        ...

    def segments_by_group(self, settings: Settings) -> bool:
        """Whether a group of heads may cut sequences into other segments than all heads would."""
        ...


class GpuCall:
    """One call's sizes, tables and scratch memory.

    Attributes:
        t: the tokens, contiguous and aligned; gates in float32 if the backend needs it.
        solves: whether there is a solve.
        most_steps, stop: of `limits`.
        small_ridge: whether conjugate gradients must expect float16 products to overflow.
        groups: the groups of heads that are processed together.
        chunks: the tables; those of all heads may be given.
        signature: what compiled kernels depend on besides the sizes: which arguments exist (`stop` among
            them), their dtypes, and the integers among them.
        held: objects that a backend holds for this call.
        kept: the array of states from or for the other pass (`gka.kernels.kept`), or None.
        views: parts of other arrays that launches read or write: (part, array, its offset in bytes).
    """

    def __init__(
        self, needs: Needs, tokens: Tokens, settings: Settings, chunks: Chunking | None = None
    ) -> None:
        self.needs, self.settings = needs, settings
        self.solves = settings.num_iter > 0
        t = self.t = prepared(tokens, needs.float_gates)
        sizes = self.sizes = _sizes(t, settings.chunk_size)
        self.H, self.HK, self.HV = sizes.heads
        self.K, self.V = sizes.dims
        self.NK, self.NV = sizes.blocks
        self.gk = t.g if settings.tied else t.gk
        self.groups = [Heads(0, self.H)]
        self.most_steps, self.stop = limits(settings, sizes.op_dtype)
        self.small_ridge = (
            self.stop is not None
            and sizes.op_dtype == torch.float16
            and settings.ridge_ratio < cg.LEAST_UNIT
        )
        optional = (t.g, self.gk, t.alpha, t.beta, t.h0, t.u0)
        self.signature: tuple = (
            self.most_steps,
            self.stop is None,
            *(None if x is None else x.dtype for x in optional),
        )
        self.held: dict[Any, Any] = {}
        self.kept: Tensor | None = None
        self.views: list[tuple[Tensor, Tensor, int]] = []
        self._scratch: dict[str, Tensor] = {}
        self._cut(self.H, chunks)

    def _cut(self, heads: int, chunks: Chunking | None = None) -> None:
        programs = heads * self.needs.scan_programs(self.sizes)
        self.chunks = chunks or chunking(self.t, self.sizes.chunk_size, programs)
        self.M, self.N = self.chunks.num_chunks, self.chunks.num_sequences

    def split_heads(self, chunk_heads: int) -> None:
        """Split the heads into groups that reuse one group's scratch; heads that share stay together.

        Args:
            chunk_heads: approximate number of chunks times heads in a group.
        """
        shared = lcm(self.H // self.HK, self.H // self.HV)
        parts = max(1, -(-self.M * self.H // chunk_heads))
        count = min(self.H, -(-self.H // parts // shared) * shared)
        if count == self.H:
            return
        starts = range(0, self.H, count)
        self.groups = [Heads(base, min(count, self.H - base)) for base in starts]
        if self.needs.segments_by_group(self.settings):
            self._cut(count)

    @cached_property
    def initial(self) -> tuple[Boundary, Boundary]:
        """Both initial states; cached, since every group of heads reads the same addresses."""
        return self.boundaries(self.t.h0, self.t.u0)

    def boundaries(self, h: Tensor | None, u: Tensor | None) -> tuple[Boundary, Boundary]:
        """Initial or final states, or their gradients, in the form that the scans read."""
        measured = self.needs.measures_boundaries
        return boundary(h, measured), boundary(u, measured)

    @property
    def scratches(self) -> list[Tensor]:
        """All tensors that `scratch` has allocated."""
        return list(self._scratch.values())

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.chunks.start, self.chunks.length

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.chunks.segments, self.chunks.bounds, self.chunks.start

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.t.q.device, dtype=dtype)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of that shape, kept by name: the next groups of heads, which are no larger, reuse it."""
        held = self._scratch.get(name)
        if held is None:
            held = self._scratch[name] = self.empty(*shape, dtype=dtype)
        return held

    def like(self, x: Tensor | None) -> Tensor | None:
        """Memory for a gate's gradient, float32; None without the gate."""
        return None if x is None else self.empty(*x.shape)

    def moments(self, heads: Heads, with_h: bool, final: bool) -> tuple[Moments | None, Moments]:
        """Memory for H (None unless `with_h`) and U at chunk starts, and for the final states."""
        h = self._moments(heads, "h", self.K, self.NK, final) if with_h else None
        return h, self._moments(heads, "u", self.V, self.NV, final)

    def _moments(self, heads: Heads, name: str, width: int, blocks: int, final: bool) -> Moments:
        shape = (self.M, heads.count)
        return Moments(
            self.scratch(f"{name}_start", *shape, self.K, width, dtype=self.sizes.op_dtype),
            self.scratch(f"{name} scales", *shape, blocks),
            self.scratch(f"{name} norms", *shape, blocks),
            self.empty(self.N, self.H, self.K, width) if final else None,
        )

    def solutions(self) -> Solutions:
        """Memory for x_t of all tokens and its scales."""
        if not self.solves:
            return Solutions(None, None)
        shape = self.t.q.shape
        return Solutions(self.empty(*shape, dtype=self.sizes.op_dtype), self.empty(*shape[:3]))

    def maxima(self, heads: Heads) -> Maxima:
        shape = (self.M, heads.count)
        return Maxima(
            k=self.scratch("max k", *shape),
            v=self.scratch("max v", *shape, self.NV),
            z=self.scratch("max z", *shape),
            d=self.scratch("max do", *shape, self.NV),
        )


# cached: equal calls share one object, with its tiles already computed
_sizes_of = lru_cache(maxsize=64)(Sizes)


def packed_chunks(needs: Needs, t: Tokens, settings: Settings) -> Chunking:
    """The tables of packed sequences for all heads at once."""
    sizes = _sizes(t, settings.chunk_size)
    return chunking(t, sizes.chunk_size, sizes.heads[0] * needs.scan_programs(sizes))


def _sizes(t: Tokens, chunk_size: int) -> Sizes:
    """The sizes of tokens that the backend accepts."""
    (*_, heads, key_dim), value_dim = t.q.shape, t.v.shape[-1]
    counts, device = (heads, t.k.shape[2], t.v.shape[2]), t.q.device
    dims, capability = (key_dim, value_dim), configs.capability_of(device)
    return _sizes_of(counts, dims, t.q.dtype, chunk_size, device, capability)


def prepared(tokens: Tokens, float_gates: bool) -> Tokens:
    """The tokens, contiguous and aligned, as compiled kernels assume."""
    t = tokens

    def gate(x: Tensor | None) -> Tensor | None:
        x = aligned(x)
        return None if x is None else x.float() if float_gates else x

    return Tokens(
        aligned(t.q), aligned(t.k), aligned(t.v), gate(t.g), gate(t.gk), gate(t.alpha), gate(t.beta),
        aligned(t.h0), aligned(t.u0), t.cu_seqlens, t.cu_seqlens_cpu,
    )  # fmt: skip


@overload
def aligned(x: Tensor) -> Tensor: ...
@overload
def aligned(x: None) -> None: ...
@overload
def aligned(x: Tensor | None) -> Tensor | None: ...
def aligned(x: Tensor | None) -> Tensor | None:
    """x, contiguous; a copy if its memory is not aligned to 16 bytes (a view into a larger tensor)."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def boundary(state: Tensor | None, measured: bool) -> Boundary:
    """A boundary state [N,H,K,V] as float32, and if `measured` the largest entry of each head."""
    if state is None:
        return None, None
    state = aligned(state.float())
    return state, state.abs().amax((-1, -2)) if measured else None
