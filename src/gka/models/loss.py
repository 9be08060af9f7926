"""Next-token cross-entropy that never holds the logits of all tokens at once.

With N tokens and a vocabulary of size V, softmax cross-entropy after a linear head needs [N,V] logits,
in float32 the largest tensor of a language model. Here they are computed for `rows` tokens at a time:

    loss = sum_n lse(W h_n) - (W h_n)_{y_n},   dloss/dlogits_n = softmax(W h_n) - onehot(y_n) = d_n,
    dloss/dh_n = W^T d_n,                      dloss/dW = sum_n d_n h_n^T,

and both gradients are computed in the forward pass, from the same logits, so that nothing is computed
twice. [N,D] and [V,D] are kept for the backward pass instead of [N,V].

The number of iterations depends on N, so torch.compile and torch.export see the loop as one operator.

Processes that share a vocabulary (`gka.models.vocabulary`) each have the logits of their own words.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gka.models.vocabulary import Vocabulary, split_cross_entropy_
from gka.ops.dispatch import autocasts, check_derivable, no_autocast, operator

IGNORE_INDEX = -100
# Bytes of float32 logits at a time: enough for efficient matrix products and, on a GPU, for few reads and
# writes of the sum of the weight's gradient.
LOGITS_BYTES = {"cpu": 64 * 2**20}
LOGITS_BYTES_ELSEWHERE = 256 * 2**20
ROWS = 256  # their multiple, so that batches have chunks of one size and tiles are full

_fused: Callable[..., tuple[Tensor, Tensor]] | None = None


@contextmanager
def compiled_on_gpu(**options: Any) -> Iterator[None]:
    """In the block, compile what lies between the products of a chunk on a GPU.

    That takes 7 ms instead of 11 for the loss of 16,384 tokens and 32,000 words with its gradients (width
    1024, bfloat16, an H100).

    Args:
        options: of torch.compile.
    """
    global _fused
    before, _fused = _fused, _compiled(**options)
    try:
        yield
    finally:
        _fused = before


@functools.cache
def _compiled(**options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_cross_entropy, dynamic=False, **options)


def next_token_targets(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label that each position predicts: the next one; none at the end of a (packed) sequence.

    Args:
        labels: [B,T] integers, -100 for positions that are not predicted.
        cu_seqlens: [N+1] bounds of packed sequences (B = 1), whose last tokens predict nothing.

    Returns:
        [B,T] of labels' dtype.
    """
    # Pad first: a slice of T - 1 columns would be a separate case for a compiler at T = 2.
    targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    if cu_seqlens is None:
        return targets
    starts = torch.zeros(targets.shape[1] + 1, dtype=torch.bool, device=targets.device)
    starts[cu_seqlens.to(targets.device, torch.long)] = True
    return targets.masked_fill(starts[1:], IGNORE_INDEX)


def mean_loss(total: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Total loss over the number of targets, or over the caller's number (gradient accumulation)."""
    if num_items_in_batch is None:
        return total / (targets != IGNORE_INDEX).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def rows_of(hidden: Tensor, words: int, logits_bytes: int | None) -> int:
    """Tokens whose logits of so many words fit in `logits_bytes` (None: the device's default)."""
    if logits_bytes is None:
        logits_bytes = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES_ELSEWHERE)
    itemsize = 8 if hidden.dtype == torch.float64 else 4
    rows = max(1, logits_bytes // (itemsize * words))
    return rows - rows % ROWS if rows > ROWS else rows


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    logits_bytes: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden weight^T) against targets.

    Args:
        hidden: [N,D], any float dtype; under autocast the products run in autocast's dtype.
        weight: [V,D].
        targets: [N] in 0..V-1, or -100 for tokens without a target.
        logits_bytes: largest size of the logits at a time, at least those of one token. None: 64 MiB on a
            CPU, 256 MiB elsewhere.
        vocabulary: the words whose rows this process has, of a weight that is split over processes; every
            one of them makes the same call. Not under torch.compile, which leaves it out of its graph.

    Returns:
        Scalar in float32 (float64 for float64 inputs), differentiable once in hidden and weight.
    """
    check_derivable("linear_cross_entropy")
    if vocabulary is not None:
        return _of_split(hidden, weight, targets, logits_bytes, vocabulary)  # pyright: ignore[reportCallIssue]
    rows = rows_of(hidden, weight.shape[0], logits_bytes)
    grads = torch.is_grad_enabled()
    if grads and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(
            hidden, weight, targets, rows, hidden.requires_grad, weight.requires_grad
        )
    return _walk(hidden, weight, targets, _product_dtype(hidden), rows, False, False)[0]


@torch.compiler.disable
def _of_split(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logits_bytes: int | None,
    vocabulary: Vocabulary,
) -> Tensor:
    """`linear_cross_entropy` of a split vocabulary."""
    hidden, weight = vocabulary.shared(hidden), vocabulary.local(weight)
    rows = rows_of(hidden, weight.shape[0], logits_bytes)
    wanted = hidden.requires_grad, weight.requires_grad
    if torch.is_grad_enabled() and any(wanted):
        return _LinearCrossEntropy.apply(hidden, weight, targets, rows, *wanted, vocabulary)
    dtype = _product_dtype(hidden)
    return _walk(hidden, weight, targets, dtype, rows, False, False, vocabulary)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        for_hidden: bool,
        for_weight: bool,
        vocabulary: Vocabulary | None = None,
    ) -> Tensor:
        dtype = _product_dtype(hidden)
        loss, *gradients = _walk(
            hidden, weight, targets, dtype, rows, for_hidden, for_weight, vocabulary
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_cross_entropy is differentiable once: its gradients are formed in the forward "
                "pass and have no graph, so create_graph=True would lose a part of the next derivative"
            )
        # Scaled in the accumulators' precision: a rounded factor would bias all gradients equally.
        hidden, weight = (
            None if kept is None else (kept * grad.to(kept.dtype)).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden, weight, None, None, None, None, None


def _walk(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rows: int,
    for_hidden: bool, for_weight: bool, vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Loss and requested gradients, in chunks of `rows` tokens; products in `dtype`."""
    if not torch.compiler.is_compiling():
        return _chunks(hidden, weight, targets, dtype, rows, for_hidden, for_weight, vocabulary)
    loss, *grads = walk_op(hidden, weight, targets, dtype, rows, for_hidden, for_weight)
    grad_hidden, grad_weight = (
        grad if wanted else None
        for grad, wanted in zip(grads, (for_hidden, for_weight), strict=True)
    )
    return loss, grad_hidden, grad_weight


def linear_cross_entropy_walk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    rows: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_walk` as an operator; a gradient that is not requested is empty."""
    with torch.no_grad():
        found = _chunks(hidden, weight, targets, dtype, rows, for_hidden, for_weight)
    loss, *grads = found
    grad_hidden, grad_weight = (loss.new_empty(0) if grad is None else grad for grad in grads)
    return loss, grad_hidden, grad_weight


walk_op = operator(linear_cross_entropy_walk)


@torch.library.register_fake(walk_op)
def _(hidden, weight, targets, dtype, rows, for_hidden, for_weight):
    loss = hidden.new_empty((), dtype=_sum_dtype(dtype))
    return (
        loss,
        loss.new_empty(hidden.shape if for_hidden else (0,)),
        loss.new_empty(weight.shape if for_weight else (0,)),
    )


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rows: int,
    for_hidden: bool, for_weight: bool, vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    wide = _sum_dtype(dtype)
    grad_hidden = torch.empty_like(hidden, dtype=wide) if for_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
    call = _fused if _fused is not None and hidden.is_cuda else _cross_entropy_
    if vocabulary is not None:
        call = functools.partial(split_cross_entropy_, vocabulary)
    with no_autocast(hidden.device.type):
        weight = weight.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            counts = (targets[part] != IGNORE_INDEX).unsqueeze(-1)
            # Tokens without a target are masked here, without another pass over the logits.
            h = hidden[part].to(dtype).masked_fill(~counts, 0)
            of_loss, d = call(h @ weight.T, targets[part], counts, for_hidden or for_weight)
            loss = loss + of_loss
            if grad_hidden is not None:
                grad_hidden[part] = (d @ weight).masked_fill_(~counts, 0)
            if grad_weight is not None:
                _accumulate_(grad_weight, d.T, h)
    return loss, grad_hidden, grad_weight


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the matrix products."""
    device = hidden.device.type
    cast = autocasts(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cross_entropy_(
    logits: Tensor, targets: Tensor, counts: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss of logits [n,V] over tokens with a target (counts [n,1]), in two passes over the logits.

    With `gradient`, the logits are overwritten by the loss's derivative with respect to them.
    """
    index = targets.unsqueeze(-1).masked_fill(~counts, 0)
    log_p = logits.log_softmax(-1, dtype=_sum_dtype(logits.dtype))
    of_target = log_p.gather(-1, index)
    if gradient:
        torch.exp(log_p, out=logits)
        # p - 1 for the target, computed without cancellation
        logits.scatter_(-1, index, of_target.expm1().to(logits.dtype))
    return -of_target.masked_fill(~counts, 0).sum(), logits


def _cross_entropy(
    logits: Tensor, targets: Tensor, counts: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """`_cross_entropy_` as a compiler takes it best: it overwrites nothing and scatters nothing."""
    index = targets.unsqueeze(-1).masked_fill(~counts, 0)
    log_p = logits.log_softmax(-1, dtype=_sum_dtype(logits.dtype))
    loss = -log_p.gather(-1, index).masked_fill(~counts, 0).sum()
    if not gradient:
        return loss, logits
    words = torch.arange(logits.shape[1], device=logits.device)
    return loss, torch.where(words == index, log_p.expm1(), log_p.exp()).to(logits.dtype)


def _accumulate_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda" and torch.version.cuda:  # 16-bit factors, float32 sum
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)
