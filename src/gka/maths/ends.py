"""A moment at a sequence's end, counted from zero, as one weighted product: what a part of a text adds.

Unrolled from zero over the T tokens of a sequence,

    E = sum_j w_j k_j v_j^T,   w_j = beta_j^2 d_j,   d_j = exp(g_{j+1} + ... + g_T).

For a gradient G of E, with e_j = d_j k_j^T G v_j,

    dk_j = w_j G v_j,   dv_j = w_j G^T k_j,   dbeta_j = 2 beta_j e_j,   dg_i = sum_{j < i} beta_j^2 e_j.

Neither direction needs a state at a chunk's start, so neither has a scan: chunks here only bound memory.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from gka.maths.grouped import group_sum, shared_matmul, weight_shared
from gka.maths.layout import chunk_layout
from gka.maths.moments import reset_floor

LONGEST = 1024  # tokens of a chunk: products over more gain nothing
SHORTEST = 64
BLOCK_ELEMENTS = 1 << 24  # of the float32 arrays [chunks, H, C, K] that are in memory at once


@dataclass(frozen=True)
class EndInputs:
    """Inputs of an end state.

    Attributes:
        k: [B,T,Hk,K]. v: [B,T,Hv,V]. g, gk, beta: [B,T,H] or None; gk is not read if g decays both states.
        heads: H. tied: whether g does. with_h: whether H is wanted.
        cu_seqlens, cu_seqlens_cpu: bounds of packed sequences, and their copy on the CPU.
    """

    k: Tensor
    v: Tensor
    g: Tensor | None
    gk: Tensor | None
    beta: Tensor | None
    heads: int
    tied: bool
    with_h: bool
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None

    def contiguous(self) -> "EndInputs":
        """The same with contiguous tensors, as kernels read them."""
        tensors = {name: getattr(self, name) for name in ("k", "v", "g", "gk", "beta")}
        laid = {name: None if x is None else x.contiguous() for name, x in tensors.items()}
        return replace(self, **laid | {"gk": None if self.tied else laid["gk"]})


@dataclass(frozen=True)
class EndGradients:
    """Gradients of the inputs, in their shapes; None where one was None, was k (v), or was not read (gk)."""

    k: Tensor
    v: Tensor | None
    g: Tensor | None
    beta: Tensor | None
    gk: Tensor | None = None


class Part:
    """Tokens cut into chunks, with the decays from each token to its sequence's end.

    Args:
        k: [B,T,Hk,K]. v: [B,T,Hv,V]; None: k, the moment H.
        g: log decay [B,T,H]; None: no decay. beta: write gate [B,T,H]; None: 1.
        heads: H.
        cu_seqlens, cu_seqlens_cpu: bounds of packed sequences and their copy on the CPU.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor | None,
        g: Tensor | None,
        beta: Tensor | None,
        heads: int,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> None:
        self.heads, self.of_h = heads, v is None
        self.work = torch.float64 if k.dtype == torch.float64 else torch.float32
        size = _chunk_size(k.shape[1], cu_seqlens)
        self.layout = chunk_layout(k.shape[0], k.shape[1], size, cu_seqlens, cu_seqlens_cpu)
        self.owner = self.layout.owners(k.device)
        self.k = self._cut(k)
        self.v = self.k if v is None else self._cut(v)
        self.beta = None if beta is None else self._cut(beta.to(self.work))
        self.decays = g is not None
        log = torch.zeros(1, dtype=torch.float64, device=k.device)
        if g is None:
            log = log.expand(self.layout.num_chunks, heads, size)
        else:
            log = self._cut(g.double().clamp_min(reset_floor(self.work)))
        self.whole = log.sum(-1)  # log decay over each chunk [M,H]
        after = pad(log[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        self.log_decay = after + self._later(self.whole).unsqueeze(-1)  # float64 [M,H,C]

    def _cut(self, x: Tensor) -> Tensor:
        """[B,T,h,...] -> [M,h,C,...], a view where sequences are whole chunks."""
        return self.layout.cut(x).transpose(1, 2)

    @property
    def total(self) -> Tensor:
        """Total log decay of each sequence, float64 [N,H]."""
        return self.layout.sums(self.whole, self.owner)

    def _earlier(self, x: Tensor) -> Tensor:
        """Sums of x [M,H] over the earlier chunks of the same sequence."""
        return self.layout.earlier(x, self.owner)

    def _later(self, x: Tensor) -> Tensor:
        """Sums of x [M,H] over the later chunks of the same sequence."""
        return self.layout.sums(x, self.owner)[self.owner] - self._earlier(x) - x

    def _blocks(self) -> list[slice]:
        chunk = self.heads * self.layout.chunk_size * max(self.k.shape[-1], self.v.shape[-1])
        return list(self.layout.blocks(max(1, BLOCK_ELEMENTS // chunk)))

    def _weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        """d_j and w_j of some chunks [M,H,C]."""
        d = self.log_decay[rows].to(self.work).exp()
        return d, d if self.beta is None else d * self.beta[rows].square()

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a_h b of h's shared head, summed in float32 or better."""
        narrow = self.k.dtype in (torch.bfloat16, torch.float16) and self.k.device.type == "cuda"
        return _scaled_product(a, b) if narrow else shared_matmul(a.to(self.work), b.to(self.work))

    def moment(self) -> Tensor:
        """E [N,H,K,V]."""
        shape = (self.layout.num_sequences, self.heads, self.k.shape[-1], self.v.shape[-1])
        end = torch.zeros(shape, dtype=self.work, device=self.k.device)
        for rows in self._blocks():
            keys = weight_shared(self._weights(rows)[1], self.k[rows].to(self.work))
            end.index_add_(0, self.owner[rows], self._product(keys.transpose(-1, -2), self.v[rows]))
        return end

    def gradients(self, grad: Tensor, grad_total: Tensor | None) -> EndGradients:
        """Gradients for G = grad [N,H,K,V], and for that of the total log decays [N,H]."""
        if self.of_h:
            grad = (grad + grad.transpose(-1, -2)) / 2
        dk = torch.empty_like(self.k, dtype=self.work)
        dv = None if self.of_h else torch.empty_like(self.v, dtype=self.work)
        d_beta2 = torch.empty(
            self.layout.num_chunks, self.heads, self.layout.chunk_size,
            dtype=self.work, device=dk.device,
        )  # fmt: skip
        for rows in self._blocks():
            d, w = (x.unsqueeze(-1) for x in self._weights(rows))
            found = grad.to(self.work)[self.owner[rows]]
            k, of_v = self.k[rows].to(self.work), self._times(self.v[rows], found.transpose(-1, -2))
            dk[rows] = group_sum((2 * w if self.of_h else w) * of_v, k.shape[1])
            if dv is not None:
                dv[rows] = group_sum(w * self._times(k, found), dv.shape[1])
            grouped = of_v.unflatten(1, (k.shape[1], -1)) * k.unsqueeze(2)
            d_beta2[rows] = d.squeeze(-1) * grouped.sum(-1).flatten(1, 2)
        return EndGradients(
            self._join(dk),
            None if dv is None else self._join(dv),
            self._join(self._decay_gradient(d_beta2, grad_total)) if self.decays else None,
            None if self.beta is None else self._join(2 * self.beta * d_beta2),
        )

    def _times(self, shared: Tensor, grad: Tensor) -> Tensor:
        """x_j G_h for rows of shared heads: [M,h,C,X] x [M,H,X,Y] -> [M,H,C,Y]."""
        m, heads, rows, _ = shared.shape
        group = self.heads // heads
        repeated = shared.unsqueeze(2).expand(m, heads, group, rows, -1).flatten(1, 2)
        return self._product(repeated, grad)

    def _decay_gradient(self, d_beta2: Tensor, grad_total: Tensor | None) -> Tensor:
        """dg_i [M,H,C]: the sum over the sequence's tokens j < i, and the total's own gradient."""
        terms = d_beta2 if self.beta is None else d_beta2 * self.beta.square()
        terms = terms.double()
        before = pad(terms[..., :-1], (1, 0)).cumsum(-1)
        before = before + self._earlier(terms.sum(-1)).unsqueeze(-1)
        if grad_total is not None:
            before = before + grad_total.double()[self.owner].unsqueeze(-1)
        return before

    def _join(self, x: Tensor) -> Tensor:
        return self.layout.join(x.transpose(1, 2))


def _chunk_size(length: int, cu_seqlens: Tensor | None) -> int:
    """Tokens of a chunk: a divisor of the length where one is long enough, for packed ones their mean."""
    if cu_seqlens is not None:
        return min(LONGEST, max(SHORTEST, length // max(1, len(cu_seqlens) - 1)))
    whole = gcd(length, LONGEST)
    return whole if whole >= SHORTEST else max(1, min(length, LONGEST))


def _scaled_product(a: Tensor, b: Tensor) -> Tensor:
    """`shared_matmul` of float16 operands, each divided by its largest entry, summed in float32.

    The kernels' operands have the same precision: 11 bits instead of bfloat16's 8.
    """
    a, of_a = _narrow(a)
    b, of_b = _narrow(b)
    m, heads, rows, inner = a.shape
    shared = b.shape[1]
    folded = a.reshape(m * shared, heads // shared * rows, inner)
    product = torch.bmm(folded, b.flatten(0, 1), out_dtype=torch.float32)
    product = product.view(m, heads, rows, b.shape[-1])
    return product * (of_a * of_b.repeat_interleave(heads // shared, 1))


def _narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / s in float16 and s [M,h,1,1], the largest entry of each matrix."""
    largest = x.abs().amax((-1, -2), keepdim=True).float().clamp_min(1e-30)
    return (x / largest).half(), largest
