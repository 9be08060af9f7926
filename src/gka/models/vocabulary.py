"""Cross-entropy over a vocabulary of which every process has a part of the words."""

from typing import Protocol

import torch
from torch import Tensor

from gka.layers.parts.modules import working_dtype


class Vocabulary(Protocol):
    """The words of which this process has the head's rows, as many as every other process.

    `gka.parallel.vocabulary` implements it.
    """

    @property
    def begin(self) -> int:
        """The first of them."""
        ...

    def local(self, weight: Tensor) -> Tensor:
        """This process's rows of the head."""
        ...

    def shared(self, hidden: Tensor) -> Tensor:
        """hidden, whose gradients are summed over the processes."""
        ...

    def max_(self, x: Tensor) -> Tensor:
        """The maximum over the processes, in place."""
        ...

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        ...


def split_cross_entropy_(
    vocabulary: Vocabulary, logits: Tensor, targets: Tensor, counts: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss of tokens with a target, from logits of this process's words; the same on all.

    Exchanges, for each token, the maximum of the processes' lse, and the sums of exp(lse - maximum) and of
    the target's logit.

    Args:
        vocabulary: this process's words.
        logits: [n,own words]. With `gradient` overwritten by the loss's derivative with respect to them.
        targets: [n], in all words.
        counts: [n,1], whether a token has a target.
        gradient: whether to form the derivative.

    Returns:
        The loss, and logits.
    """
    index = targets.unsqueeze(-1) - vocabulary.begin
    here = counts & (index >= 0) & (index < logits.shape[1])
    index = index.masked_fill(~here, 0)
    wide = logits.to(working_dtype(logits))
    own = wide.logsumexp(-1, keepdim=True)
    most = vocabulary.max_(own.clone())
    of_target = wide.gather(-1, index).masked_fill(~here, 0)
    total, of_target = vocabulary.sum_(torch.stack([(own - most).exp(), of_target]))
    lse = most + total.log()
    loss = (lse - of_target).masked_fill(~counts, 0).sum()
    if gradient:
        log_p = wide - lse
        torch.exp(log_p, out=logits)
        at_index = torch.where(here, log_p.gather(-1, index).expm1(), logits.gather(-1, index))
        logits.scatter_(-1, index, at_index.to(logits.dtype))
    return loss, logits
