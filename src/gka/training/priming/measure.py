"""What is measured on held-out blocks: the loss of the next token, and how well new mixers match."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from gka.models.loss import next_token_targets
from gka.training.priming.matching import Matching

Collate = Callable[[list[Any]], dict[str, Tensor]]


class HeldOut:
    """Held-out blocks, and how they are run.

    Args:
        blocks: the data set; with a `collate` of its own if it has one.
        batch_size: blocks of a forward pass.
        dtype: "float32", or "bfloat16" for autocast.
        bytes_per_target: bytes of text that a predicted token stands for, on average.
    """

    def __init__(
        self, blocks: Dataset, batch_size: int, dtype: str, bytes_per_target: float
    ) -> None:
        self.blocks, self.batch_size, self.dtype = blocks, batch_size, dtype
        self.bytes_per_target = bytes_per_target
        self.collate: Collate = getattr(blocks, "collate", default_collate)

    def batches(self, device: torch.device, most: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The batches on `device`, of the first `most` blocks."""
        count = len(self.blocks)  # type: ignore[arg-type]
        count = count if most is None else min(count, most)
        for start in range(0, count, self.batch_size):
            items = [self.blocks[i] for i in range(start, min(count, start + self.batch_size))]
            yield {name: value.to(device) for name, value in self.collate(items).items()}

    def autocast(self, device: torch.device) -> Any:
        """The arithmetic of the training, as a context."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @torch.no_grad()
    def loss(self, model: Any, most: int | None = None) -> float:
        """Mean loss of all predicted tokens, in nats."""
        total, targets = 0.0, 0
        device = next(model.parameters()).device
        with in_evaluation(model), self.autocast(device):
            for batch in self.batches(device, most):
                found = next_token_targets(batch["labels"], batch.get("cu_seqlens"))
                count = int((found != -100).sum())
                total += float(model(**batch, return_logits=False).loss) * count
                targets += count
        return total / targets

    def figures(self, model: Any) -> dict[str, float]:
        """`loss` (nats a token), `perplexity` (its exponential) and `bits_per_byte` of text."""
        loss = self.loss(model)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / self.bytes_per_target,
        }

    @torch.no_grad()
    def match(self, matching: Matching, device: torch.device) -> dict[str, float]:
        """Each replaced layer's e_l (`gka.training.priming.matching`), mean over batches."""
        with self.autocast(device):
            rows = [matching(**batch)["layers"] for batch in self.batches(device)]
        means: Sequence[float] = torch.stack(rows).double().mean(0).tolist()
        return dict(zip(matching.mixers, means, strict=True))


@contextmanager
def in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and back."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def share_recovered(teacher: float, initial: float, now: float) -> float | None:
    """How much of the loss that replacing cost has come back: 0 nothing, 1 all; None if it cost none."""
    gap = initial - teacher
    return (initial - now) / gap if gap > 0 else None
