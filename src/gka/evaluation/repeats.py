"""Loss on what a text repeats: tokens that a model can predict by recall, and the rest.

A token is repeated if the n-gram that it ends occurred before in the same row: a model that recalls what
followed the n - 1 tokens before can predict it. (Arora et al., "Zoology", arXiv 2312.04927, measure the same
with n = 2.) Much of that is also in the training text, so that weights know it. What is left is `recalled`:
repeated, and never seen in training.

    repeats = Repeats.of(rows, 12, training)
    losses, right = token_losses(model, rows, 4)
    found = by_slice(losses, right, repeats.slices(far=1024))
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gka.errors import InputError

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
PART = 1 << 20  # tokens of a corpus that are hashed at a time


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of each n-gram of `ids` [..., T], in order: uint64 [..., max(T - n + 1, 0)].

    Two different n-grams share a hash with a chance of about 2^-64.

    Raises:
        InputError: `n` is below 1.
    """
    if n < 1:
        raise InputError(f"n is {n}; expected 1 or more")
    count = max(ids.shape[-1] - n + 1, 0)
    found = np.zeros((*ids.shape[:-1], count), np.uint64)
    for place in range(n):
        found = found * _FACTOR + ids[..., place : place + count].astype(np.uint64) + np.uint64(1)
        found ^= found >> np.uint64(29)
    return found


def gaps(rows: np.ndarray, n: int) -> np.ndarray:
    """Tokens since the n-gram that ends at each token last ended in the same row; 0 if it never did.

    Args:
        rows: ids [B,T].
        n: tokens of an n-gram.

    Returns:
        int64 [B,T].
    """
    found = np.zeros(rows.shape, np.int64)
    for row, hashes in zip(found, ngram_hashes(rows, n), strict=True):
        order = np.argsort(hashes, kind="stable")
        same = hashes[order[1:]] == hashes[order[:-1]]
        later, earlier = order[1:][same], order[:-1][same]
        row[later + n - 1] = later - earlier
    return found


def seen_in(rows: np.ndarray, n: int, corpus: Iterable[np.ndarray]) -> np.ndarray:
    """Whether the n-gram that ends at each token of `rows` [B,T] is in a corpus: bool [B,T].

    Args:
        corpus: arrays of ids; an n-gram of a corpus lies within one of them.
    """
    hashes = ngram_hashes(rows, n)
    wanted = np.unique(hashes)
    known = np.zeros(len(wanted) + 1, bool)
    for ids in corpus:
        for start in range(0, max(len(ids) - n + 1, 0), PART):
            part = ngram_hashes(np.asarray(ids[start : start + PART + n - 1]), n)
            at = np.searchsorted(wanted, part)
            known[at[np.append(wanted, np.uint64(0))[at] == part]] = True
    found = np.zeros(rows.shape, bool)
    found[:, n - 1 :] = known[:-1][np.searchsorted(wanted, hashes)]
    return found


@dataclass(frozen=True)
class Repeats:
    """What the rows of a text repeat.

    Attributes:
        gaps: tokens since the n-gram that ends at each token last ended in its row, 0 if never; int64 [B,T].
        seen: whether the training text has that n-gram, bool [B,T].
    """

    gaps: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, n: int, training: Iterable[np.ndarray]) -> "Repeats":
        """The repeats of ids [B,T]; `training`: arrays of the training text's ids."""
        return cls(gaps(rows, n), seen_in(rows, n, training))

    def slices(self, far: int) -> dict[str, np.ndarray]:
        """Masks bool [B,T-1] of the predicted tokens, which are all but the first of each row.

        all: every token. new: its n-gram did not occur before in the row. repeated: it did. recalled:
        repeated, and not in the training text. far: recalled, and the last time `far` tokens back or more.
        """
        gap, novel = self.gaps[:, 1:], ~self.seen[:, 1:]
        return {
            "all": np.ones_like(novel),
            "new": gap == 0,
            "repeated": gap > 0,
            "recalled": (gap > 0) & novel,
            "far": (gap >= far) & novel,
        }


@torch.no_grad()
def token_losses(
    model: Any,
    rows: np.ndarray,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[np.ndarray, np.ndarray]:
    """-log p in nats of every token but the first of each row, and whether it is the likeliest.

    Args:
        model: a causal language model; it is put into evaluation mode.
        rows: ids [B,T].
        batch_size: rows per forward pass.
        autocast: context of the arithmetic.

    Returns:
        float32 and bool [B,T-1].
    """
    model.eval()
    device = next(model.parameters()).device
    losses, right = [], []
    for part in torch.from_numpy(rows.astype(np.int64)).split(batch_size):
        ids = part.to(device)
        with autocast():
            logits = model(ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:]
        each = torch.nn.functional.cross_entropy(logits.float().mT, targets, reduction="none")
        losses.append(each.cpu().numpy())
        right.append((logits.argmax(-1) == targets).cpu().numpy())
    return np.concatenate(losses), np.concatenate(right)


def by_slice(
    losses: np.ndarray, right: np.ndarray, slices: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Tokens, mean loss in nats and accuracy of each slice; the last two are None in an empty one.

    Args:
        losses, right: of `token_losses`, [B,T-1].
        slices: masks of the same shape.
    """
    found = {}
    for name, mask in slices.items():
        count = int(mask.sum())
        means = [float(x[mask].mean(dtype=np.float64)) if count else None for x in (losses, right)]
        found[name] = {"tokens": count, "loss": means[0], "accuracy": means[1]}
    return found
