"""A vocabulary split over the ranks of a group: embedding, output head, and what the loss exchanges.

Every rank has the rows of as many words in both matrices. It looks up those of a batch's tokens that are its
own, and the ranks' results are summed: all but one are zero. The head computes the logits of its own words;
the loss (`gka.models.loss`) needs one maximum and two sums a token from the other ranks, and never the logits
of all words. A call for logits gathers them.

A vocabulary that the ranks do not divide stays whole on each of them: torch cannot put uneven rows on a mesh
of two dimensions.
"""

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gka.parallel.exchanges import copied, joined_columns, summed

ENDS = ("embed_tokens", "lm_head")


def _rows_here(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True)
class VocabularyPart:
    """This rank's words of a vocabulary, `gka.models.vocabulary.Vocabulary`.

    Attributes:
        mesh: the group, of one dimension.
        words: how many each rank has.
    """

    mesh: DeviceMesh
    words: int

    @property
    def begin(self) -> int:
        """The first word of this rank."""
        return self.mesh.get_local_rank() * self.words

    def local(self, weight: Tensor) -> Tensor:
        """This rank's rows of the matrix, of which calls of the model may see these alone."""
        return _rows_here(weight)

    def shared(self, hidden: Tensor) -> Tensor:
        """Hidden states for the work on this rank's words; their gradients are summed over the ranks."""
        return copied(hidden, self.mesh)

    def max_(self, x: Tensor) -> Tensor:
        """The elementwise maximum of every rank's x, in its place, without gradient."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return x

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in its place, without gradient."""
        dist.all_reduce(x, group=self.mesh.get_group())
        return x


class WholeVocabulary:
    """All words of a head that is a DTensor, the same on every rank: `gka.models.vocabulary.Vocabulary`."""

    begin = 0

    def local(self, weight: Tensor) -> Tensor:
        return _rows_here(weight)

    def shared(self, hidden: Tensor) -> Tensor:
        return hidden

    def max_(self, x: Tensor) -> Tensor:
        return x

    def sum_(self, x: Tensor) -> Tensor:
        return x


def splits(words: int, ranks: int) -> bool:
    """Whether a vocabulary is split over that many ranks: whether they divide it."""
    return words % ranks == 0


def split_embedding(embedding: Any, mesh: DeviceMesh) -> None:
    """Let an `nn.Embedding` look up this rank's words and add up the ranks' results, in place.

    Its weight must be, or become, a DTensor of rows, or in calls this rank's rows.
    """
    part = VocabularyPart(mesh, embedding.num_embeddings // mesh.size())

    def lookup(ids: Tensor) -> Tensor:
        weight = part.local(embedding.weight)
        own = ids - part.begin
        here = (own >= 0) & (own < weight.shape[0])
        rows = F.embedding(own.masked_fill(~here, 0), weight)
        return summed(rows.masked_fill(~here.unsqueeze(-1), 0), mesh)

    embedding.forward = lookup


def split_head(head: Any, mesh: DeviceMesh) -> None:
    """Let an `nn.Linear` without bias, whose rows are words, compute this rank's logits, in place.

    Calls gather all words' logits. `gka.models.loss.linear_cross_entropy` takes `head.vocabulary`, and does
    not.
    """
    head.vocabulary = part = VocabularyPart(mesh, head.out_features // mesh.size())
    forward = head.forward

    @wraps(forward)
    def logits(hidden: Tensor) -> Tensor:
        local = F.linear(part.shared(hidden), part.local(head.weight))
        return joined_columns(local, mesh)

    head.forward = logits


def split_vocabulary(model: nn.Module, mesh: DeviceMesh) -> set[str]:
    """Let a model's embedding and, if it has one, its head compute with this rank's words, in place.

    Returns:
        The names of their matrices in the model, whose rows are to be split; a tied one has both its names.
        Empty if the ranks do not divide the vocabulary.
    """
    names = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ENDS and split_end(module, mesh):
            names.add(f"{name}.weight")
    return names


def split_end(module: nn.Module, mesh: DeviceMesh) -> bool:
    """Let an embedding or a head compute with this rank's words, in place, if ranks divide the vocabulary."""
    rows: Any = module.weight
    if not splits(rows.shape[0], mesh.size()):
        return False
    if isinstance(module, nn.Embedding):
        split_embedding(module, mesh)
    else:
        split_head(module, mesh)
    return True
