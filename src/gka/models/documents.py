"""Where documents begin in a call's rows: one form for the several of transformers' tools.

A collator that packs instead of padding marks documents by bounds (`cu_seq_lens_q`, `cu_seq_lens_k`), by a
number per document (`seq_idx`), or by `position_ids` that start again. The layers take bounds in one row,
`cu_seqlens`, which are computed here once, before the first layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gka.errors import InputError
from gka.layers.parts.masks import token_mask
from gka.ops.context import SequenceContext

_BOUNDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass
class Packing:
    """A call's arguments that mark documents; None for those not given.

    Attributes:
        cu_seqlens, cu_seq_lens_q, cu_seq_lens_k: [N+1] bounds in a single row.
        max_length_q, max_length_k: tokens of the longest document, or more.
        seq_idx: [B,T] or [1,T], the same number throughout a document.
        position_ids: [B,T] or [1,T]; a position that is not above the previous one begins a document.
    """

    cu_seqlens: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: Tensor | int | None = None
    max_length_k: Tensor | int | None = None
    seq_idx: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def marked(self) -> bool:
        """Whether documents are marked token by token."""
        return self.seq_idx is not None or self.position_ids is not None


# Neither frozen nor a tuple, so that wrappers that move or cast arguments can copy it or leave it unchanged.
@dataclass
class Documents:
    """The documents of a call [B,T]. Without bounds each row is one document, padded or not.

    Attributes:
        cu_seqlens: int64 [N+1], bounds in the row of all B*T tokens, on the tokens' device.
        cu_seqlens_cpu: their copy on the CPU, if cu_seqlens is on another device.
        shape: (B, T).
    """

    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    @property
    def packed(self) -> bool:
        """Whether there are bounds."""
        return self.cu_seqlens is not None

    def row(self, x: Tensor) -> Tensor:
        """[B,T,...] or [1,T,...] -> [1,B*T,...] if there are bounds, else x."""
        if not self.packed:
            return x
        return x.expand(*self.shape, *x.shape[2:]).reshape(1, -1, *x.shape[2:])

    def rows(self, x: Tensor) -> Tensor:
        """[1,B*T,...] -> [B,T,...] if there are bounds, else x."""
        return x if not self.packed else x.reshape(*self.shape, *x.shape[2:])


def find_documents(
    tokens: Tensor | None,
    packing: Packing,
    attention_mask: Tensor | None = None,
    caching: bool = False,
    context: SequenceContext | None = None,
) -> Documents:
    """The documents of a call; none if a context holds them.

    Bounds take precedence over seq_idx, and seq_idx over position_ids. With bounds on the CPU nothing waits.
    Bounds on a GPU are read once per call for all layers, and so are seq_idx and position_ids if rows have
    more than one token.

    Args:
        tokens: input_ids [B,T] or embeddings [B,T,D].
        packing: the call's arguments.
        attention_mask: [B,>=T], 1 for tokens. Padding may be between documents, not inside one.
        caching: whether the call reads or starts a cache.
        context: rows that are split over ranks, and their documents.

    Raises:
        InputError: arguments come with a context that holds what they say, or other tokens than its rank's;
            bounds do not fit, contradict each other or come with padding; there is padding inside a
            document, or several documents in a row to be cached.
    """
    if tokens is None or tokens.dim() < 2:
        return Documents()  # the model refuses the call
    if context is not None:
        given = {**vars(packing), "attention_mask": attention_mask, "use_cache": caching or None}
        _check_split(context, tokens, [name for name, x in given.items() if x is not None])
        return Documents()
    name = _bounds_name(packing)
    if name is not None:
        documents = _from_bounds(name, packing, tokens, attention_mask)
    elif tokens.shape[1] > 1 and packing.marked:
        name, documents = _from_marks(packing, tokens, attention_mask)
    else:
        return Documents()
    if caching and documents.packed:
        raise InputError(
            f"packed sequences ({name}) cannot be cached: run them as a padded batch with attention_mask, "
            "or leave out past_key_values and use_cache"
        )
    return documents


def _check_split(context: SequenceContext, tokens: Tensor, given: list[str]) -> None:
    """Check that a call has its rank's tokens, and nothing that the context holds or that cannot be split."""
    if given:
        raise InputError(
            f"{', '.join(given)}: not together with context. Documents and padding are facts of whole rows: "
            "give cu_seqlens or attention_mask to ContextParallel, which also counts positions. A cache, and "
            "so generate, needs whole rows."
        )
    length = context.end - context.begin
    if tokens.shape[1] != length:
        raise InputError(
            f"rank {context.rank} has tokens {context.begin} to {context.end} of each row: expected "
            f"input_ids [batch, {length}], got {tuple(tokens.shape)}. Pass context.shard(input_ids), "
            "and labels alike."
        )


def _bounds_name(packing: Packing) -> str | None:
    """The argument that holds the bounds; None if there are none."""
    given = [name for name in _BOUNDS if getattr(packing, name) is not None]
    if not given:
        for name in ("max_length_q", "max_length_k"):
            if getattr(packing, name) is not None:
                raise InputError(f"{name} says nothing by itself: pass cu_seq_lens_q with it")
        return None
    if given[0] == "cu_seqlens" and len(given) > 1:
        raise InputError(f"cu_seqlens and {given[1]} are two names of one thing: give one of them")
    return given[0]


def _from_bounds(
    name: str, packing: Packing, tokens: Tensor, attention_mask: Tensor | None
) -> Documents:
    bounds: Tensor = getattr(packing, name)
    other = packing.cu_seq_lens_k
    _check_form(name, bounds)
    if tokens.shape[0] != 1:
        raise InputError(
            f"{name} needs the sequences packed into batch 1, got batch {tokens.shape[0]}"
        )
    if attention_mask is not None and _may_pad(attention_mask, tokens.shape[1]):
        raise InputError(
            f"attention_mask and {name} exclude each other: packed sequences have no padding"
        )
    if bounds.is_meta:  # no values
        return Documents(bounds.long(), None, (1, tokens.shape[1]))
    on_cpu = bounds.cpu() if other is None or other is bounds else _agreed(bounds, other)
    if not torch.compiler.is_compiling():  # compiled code cannot read values; the ops check them
        _check_values(name, on_cpu, tokens.shape[1])
        _check_longest(packing, on_cpu)
    on_device = bounds if bounds.device == tokens.device else on_cpu
    return _documents(on_device, on_cpu, tokens, (1, tokens.shape[1]))


def _documents(bounds: Tensor, on_cpu: Tensor, tokens: Tensor, shape: tuple[int, int]) -> Documents:
    """Documents with bounds on the tokens' device, and a CPU copy if that is not the CPU."""
    copy = None if tokens.device.type == "cpu" else on_cpu.long()
    return Documents(bounds.to(tokens.device, torch.long, non_blocking=True), copy, shape)


def _may_pad(attention_mask: Tensor, length: int) -> bool:
    """Whether a mask may hold padding. Compiled code does not read masks, so any mask may."""
    unread = torch.compiler.is_compiling() or attention_mask.is_meta
    return unread or attention_mask.shape != (1, length) or not token_mask(attention_mask).all()


def _check_form(name: str, bounds: object) -> None:
    if not isinstance(bounds, Tensor) or bounds.dtype not in (torch.int64, torch.int32):
        kind = bounds.dtype if isinstance(bounds, Tensor) else type(bounds).__name__
        raise InputError(f"{name} must be a tensor of int64 or int32, got {kind}")
    if bounds.dim() != 1 or bounds.shape[0] < 2:
        raise InputError(
            f"{name} must be [documents + 1] bounds in one row, got shape {tuple(bounds.shape)}"
        )


def _agreed(bounds: Tensor, other: Tensor) -> Tensor:
    """cu_seq_lens_q on the CPU, checked to equal cu_seq_lens_k; both are read at once."""
    _check_form("cu_seq_lens_k", other)
    if bounds.shape != other.shape:
        equal, on_cpu = False, bounds
    elif bounds.device == other.device:
        on_cpu, copy = torch.stack([bounds.long(), other.long()]).cpu()
        equal = torch.compiler.is_compiling() or torch.equal(on_cpu, copy)
    else:
        on_cpu = bounds.cpu()
        equal = torch.compiler.is_compiling() or torch.equal(on_cpu.long(), other.cpu().long())
    if not equal:
        raise InputError(
            "cu_seq_lens_k must equal cu_seq_lens_q: each document sees itself, and there is no other past"
        )
    return on_cpu


def _check_values(name: str, on_cpu: Tensor, length: int) -> None:
    first, last = int(on_cpu[0]), int(on_cpu[-1])
    if first != 0 or last != length:
        raise InputError(
            f"{name} must start with 0 and end with the row's {length} tokens, got {first} .. {last}"
        )
    if (on_cpu.diff() < 0).any():
        raise InputError(f"{name} must not decrease, got {on_cpu.tolist()}")


def _check_longest(packing: Packing, on_cpu: Tensor) -> None:
    """Check that no document is longer than the caller's maximum; numbers on a device are not read."""
    longest = int(on_cpu.diff().max())
    for name in ("max_length_q", "max_length_k"):
        limit = getattr(packing, name)
        if limit is None or (isinstance(limit, Tensor) and limit.device.type != "cpu"):
            continue
        if int(limit) < longest:
            raise InputError(
                f"{name} is {int(limit)}, but the longest document has {longest} tokens"
            )


@torch.compiler.disable(
    reason="seq_idx and position_ids are read to find documents: pass cu_seq_lens_q for a single graph"
)
def _from_marks(
    packing: Packing, tokens: Tensor, attention_mask: Tensor | None
) -> tuple[str, Documents]:
    """(name, documents): those marked by seq_idx, or else by position_ids, and the argument's name."""
    batch, length = tokens.shape[:2]
    name = "position_ids" if packing.seq_idx is None else "seq_idx"
    marks: Tensor = getattr(packing, name)
    if marks.dim() != 2 or marks.shape[0] not in (1, batch) or marks.shape[1] != length:
        raise InputError(f"{name} must be [batch, {length}], got shape {tuple(marks.shape)}")
    if marks.is_meta or not _covers(attention_mask, batch, length):
        return name, Documents()  # nothing to read, or the mixers refuse the call
    marks = marks.expand(batch, length)
    if attention_mask is None:
        is_token = torch.ones_like(marks, dtype=torch.bool)
    else:
        is_token = token_mask(attention_mask)[:, -length:].bool().to(marks.device)
    starts = _starts(name, marks, is_token)
    if starts is None:
        return name, Documents()
    end = torch.tensor([batch * length], device="cpu")
    bounds = torch.cat([starts.flatten().nonzero().flatten(), end])
    return name, _documents(bounds, bounds, tokens, (batch, length))


def _covers(attention_mask: Tensor | None, batch: int, length: int) -> bool:
    if attention_mask is None:
        return True
    shape = attention_mask.shape
    return len(shape) == 2 and shape[0] == batch and shape[1] >= length


def _starts(name: str, marks: Tensor, is_token: Tensor) -> Tensor | None:
    """Where a document or a run of padding begins, bool [B,T] on the CPU; None if no row has two documents.

    Args:
        name: "position_ids" or "seq_idx", the name of the marks.
        marks: [B,T]. is_token: bool [B,T].

    Raises:
        InputError: there is padding inside a document.
    """
    places = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    # The last token before each place in its row, padding skipped; -1 for none.
    last = places.masked_fill(~is_token, -1).cummax(1).values
    last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    before = marks.take_along_dim(last.clamp(min=0), 1)
    goes_on = (marks > before if name == "position_ids" else marks == before) & (last >= 0)
    begins = is_token & ~goes_on
    cut = is_token & goes_on & (last != places - 1)
    again = begins & (last >= 0)
    # One read from the device for all four.
    again, cut, begins, is_token = torch.stack([again, cut, begins, is_token]).cpu()
    if not again.any():
        return None
    if cut.any():
        raise InputError(
            f"{name} tell of several documents in a row, and attention_mask of padding inside one of them: "
            "padding may only stand between documents"
        )
    after_token = torch.nn.functional.pad(is_token[:, :-1], (1, 0), value=True)
    return begins | (~is_token & after_token)
