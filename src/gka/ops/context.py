"""A sequence split over ranks: the protocol of its collectives, and the functions that carry states across.

Each rank holds one range of the tokens. Its memory starts from the state that the earlier ranks leave,

    S_r = A_{r-1} S_{r-1} + E_{r-1},

with E the state that a rank's tokens add to an empty one, and A what they do to an earlier one: a decay,
or for the delta rule a matrix. One gather of (A, E) gives every rank its S_r. Backwards, the gradient is

    dE_p = sum over r > p of (A_{r-1} ... A_{p+1})^T dS_r,    dA_p = dE_p S_p^T  (a decay: <dE_p, A_p S_p>),

one reduce-scatter of what every rank owes to earlier ones. A rank keeps its own S_r, not what it gathered.
`gka.parallel` implements the collectives; nothing here knows how ranks talk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from gka.errors import InputError
from gka.maths.ends import EndInputs
from gka.ops.end_state import end_moments

State = tuple[Tensor, Tensor]


class SequenceContext(Protocol):
    """One rank's place in a batch whose tokens are split over ranks, and its collectives.

    Attributes:
        rank, ranks: this rank, and their number.
        ranges: (begin, end) of every rank's tokens in every row.
        begin, end: this rank's.
        length: tokens of a whole row.
        origins: for each rank, the rank where the document of its first token begins.
        firsts: for each rank, the place in the row where that document begins.
        cu_seqlens, cu_seqlens_cpu: bounds of this rank's parts of packed documents; None without packing.
        documents: the numbers of these documents among all packed ones, () without packing.
        attention_mask: bool [B, length] of whole rows, True for tokens; None without padding.
    """

    rank: int
    ranks: int
    ranges: list[tuple[int, int]]
    begin: int
    end: int
    length: int
    origins: tuple[int, ...]
    firsts: tuple[int, ...]
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    documents: tuple[int, ...]
    attention_mask: Tensor | None

    @property
    def positions(self) -> Tensor:
        """Places of this rank's tokens in their document, padding not counted, [B or 1, end - begin]."""
        ...

    def bounds(self, halo: int) -> tuple[Tensor | None, Tensor | None]:
        """cu_seqlens and its CPU copy, of this rank's tokens behind `halo` of its first document's."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, [...] -> [ranks, ...]. All ranks call it, with one shape and dtype."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of their x[rank], [ranks, ...] -> [...]. All ranks call it."""
        ...

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send sent[r] numbers of x [n] to each rank r, in order; those received, received[r] from each r.

        All ranks call it, also with nothing to send or to receive.
        """
        ...


def sources(context: SequenceContext) -> range:
    """The earlier ranks that hold tokens of this rank's first document."""
    return range(context.origins[context.rank], context.rank)


class Transition(NamedTuple):
    """What tokens do to an earlier state: log decays [N,H], matrices [N,H,K,K], or nothing (None)."""

    value: Tensor | None

    def along(self, state: Tensor) -> Tensor:
        """A S."""
        if self.value is None:
            return state
        return self.value @ state if self.value.dim() == 4 else self._decay(state) * state

    def back(self, grad: Tensor) -> Tensor:
        """A^T dS."""
        if self.value is None:
            return grad
        return self.value.mT @ grad if self.value.dim() == 4 else self._decay(grad) * grad

    def gradient(self, grad: Tensor, state: Tensor) -> Tensor:
        """Gradient of the value, from that of A S at S."""
        assert self.value is not None
        if self.value.dim() == 4:
            return grad @ state.mT
        return (grad * self.along(state)).sum((-1, -2))

    def _decay(self, like: Tensor) -> Tensor:
        assert self.value is not None
        return self.value.double().exp().to(like.dtype)[..., None, None]


class Carry(torch.autograd.Function):
    """Every rank's start states from all ranks' transitions and end states: the collectives of a layer.

    Every rank runs it, the first too: a collective that one rank leaves out never ends.
    Arguments: the context; `of`, for each state the number of its transition or None; the transitions'
    values; the end states [N,H,K,.]. Returns the start states.
    """

    @staticmethod
    def forward(
        ctx: Any, context: SequenceContext, of: tuple[int | None, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        values, ends = tensors[: len(tensors) - len(of)], tensors[len(tensors) - len(of) :]
        gathered = _unpack(context.gather(_pack(tensors)), tensors)
        every_value, every_end = gathered[: len(values)], gathered[len(values) :]
        starts = []
        for number, end, ends_of in zip(of, ends, every_end, strict=True):
            state = torch.zeros_like(end)
            for rank in sources(context):
                value = None if number is None else every_value[number][rank]
                state = Transition(value).along(state) + ends_of[rank]
            starts.append(state)
        kept = [x[sources(context).start : context.rank].clone() for x in every_value]
        ctx.save_for_backward(*values, *kept, *starts)
        ctx.context, ctx.of, ctx.values = context, of, len(values)
        return tuple(starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("A sequence split over ranks has no second derivative.")
        context, of, count = ctx.context, ctx.of, ctx.values
        saved = ctx.saved_tensors
        values, kept, starts = saved[:count], saved[count : 2 * count], saved[2 * count :]
        owed = [
            _owed(context, None if n is None else kept[n], dx)
            for n, dx in zip(of, grads, strict=True)
        ]
        of_ends = _unpack(
            context.reduce_scatter(torch.cat([x.flatten(1) for x in owed], 1)), starts
        )
        of_values = [torch.zeros_like(x) for x in values]
        if context.rank > context.origins[context.rank] and len(context.documents) <= 1:
            for number, dx, start in zip(of, of_ends, starts, strict=True):
                if number is not None:
                    of_values[number] += Transition(values[number]).gradient(dx, start)
        return None, None, *of_values, *of_ends


def _owed(context: SequenceContext, values: Tensor | None, grad: Tensor) -> Tensor:
    """What this rank's start state owes to every rank's end state, [ranks, ...]; zero where nothing."""
    owed = grad.new_zeros(context.ranks, *grad.shape)
    first = sources(context).start
    for rank in reversed(sources(context)):
        owed[rank] = grad
        grad = Transition(None if values is None else values[rank - first]).back(grad)
    return owed


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_pack`; leading dimensions stay."""
    parts = packed.split([x.numel() for x in like], -1)
    return [y.unflatten(-1, x.shape) for x, y in zip(like, parts, strict=True)]


def last_document(context: SequenceContext, *inputs: Tensor | None) -> list[Tensor | None]:
    """[B,T,...] cut to this rank's last document."""
    bounds = context.cu_seqlens_cpu if context.cu_seqlens_cpu is not None else context.cu_seqlens
    begin = 0 if bounds is None else int(bounds[-2])
    return [None if x is None else x[:, begin:] for x in inputs]


def carried_states(
    context: SequenceContext,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    heads: int,
    initial_state: tuple[Tensor | None, Tensor | None],
    with_h: bool,
) -> tuple[Tensor | None, Tensor]:
    """H and U before this rank's first token of each of its sequences [n,H,K,.]; H is None unless `with_h`.

    Args:
        k, v, g, gk, beta: this rank's tokens, checked. gk is g if one decay serves both states.
        heads: H.
        initial_state: H and U before the first token of every whole sequence, or None for zeros.
    """
    h0, u0 = (own_initial(context, x) for x in initial_state)
    tied = gk is not None and gk is g
    k_, v_, g_, gk_, beta_ = last_document(context, k, v, g, gk, beta)
    assert k_ is not None and v_ is not None
    given = EndInputs(k_, v_, g_, gk_, beta_, heads, tied, with_h)
    total_u, total_h, u, h = end_moments(given)
    of_u = (total_u, u, u0)
    if h is None:
        return None, carry(context, [of_u])[0]
    found_h, found_u = carry(context, [(total_h, h, h0), of_u])
    return found_h, found_u


def carry(
    context: SequenceContext, states: Sequence[tuple[Tensor | None, Tensor, Tensor | None]]
) -> list[Tensor]:
    """The states before this rank's first token of each of its sequences [n,H,K,.].

    Args:
        states: for each state the transition of this rank's last sequence over its tokens here, what they
            add to an empty state [N,H,K,.], and this rank's own initial states [n,H,K,.] or None.
    """
    values: list[Tensor] = []
    of: list[int | None] = []
    ends: list[Tensor] = []
    rows = len(states[0][1])
    for value, end, own in states:
        known = [n for n, x in enumerate(values) if x is value]
        if value is not None and not known:
            known = [len(values)]
            values.append(value)
        of.append(known[0] if known else None)
        ends.append(end if own is None else end + Transition(value).along(own[-rows:]))
    starts = Carry.apply(context, tuple(of), *values, *ends)
    return [
        _in_place(context, start, own) for start, (_, _, own) in zip(starts, states, strict=True)
    ]


def _in_place(context: SequenceContext, start: Tensor, own: Tensor | None) -> Tensor:
    """The carried state before the first sequence, the own initial states before the others."""
    others = max(len(context.documents) - len(start), 0)
    start = pad(start, (0, 0, 0, 0, 0, 0, 0, others)) if others else start
    return start if own is None else start + own


def own_initial(context: SequenceContext, state: Tensor | None) -> Tensor | None:
    """This rank's part of the whole sequences' initial states: zero for those that begin earlier."""
    if state is None:
        return None
    begun = context.rank > context.origins[context.rank]
    if context.cu_seqlens is None:
        return state * 0 if begun else state
    if len(state) == 1:  # the first sequence's
        mine = state if context.documents[0] == 0 else state * 0
        state = pad(mine, (0, 0, 0, 0, 0, 0, 0, len(context.documents) - 1))
    else:
        state = state[list(context.documents)]
    return torch.cat([state[:1] * 0, state[1:]]) if begun else state


def check_context(context: SequenceContext, length: int, cu_seqlens: Tensor | None) -> None:
    """Check that a call has this rank's tokens, and no bounds of its own.

    Raises:
        InputError: it has not; the message says what to pass where.
    """
    if length != context.end - context.begin:
        raise InputError(
            f"rank {context.rank} of this context holds tokens {context.begin} to {context.end} of each row, "
            f"{context.end - context.begin} of {context.length}; got {length}. Pass context.shard(x)."
        )
    if cu_seqlens is not None:
        raise InputError(
            "cu_seqlens: the context holds the bounds of whole rows: give them to ContextParallel, and leave "
            "them out of the call."
        )
