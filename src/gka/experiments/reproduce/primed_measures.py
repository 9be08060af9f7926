"""What `hybrid` measures of a model: loss, recall, needles beyond the training length, memory, speed."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch

from gka.evaluation.repeats import Repeats, by_slice, token_losses
from gka.experiments.chain_measures import NeedleTest
from gka.experiments.reproduce.experiment import finite

PLACES = (2048, 32768)
"""Tokens read when memory is counted."""


@dataclass(frozen=True)
class Text:
    """Held-out text.

    Attributes:
        rows: blocks of the training's length, ids [B,T].
        repeats: what they repeat.
        long: longer blocks, ids [B',T'].
        filler: all ids in order.
    """

    rows: np.ndarray
    repeats: Repeats
    long: np.ndarray
    filler: list[int]


@lru_cache(1)
def held_out_text(length: int, longer: int, fraction: float, n: int) -> Text:
    """The held-out part of Python's standard library as bytes: that of `gka train` and `gka prime`.

    Args:
        length, longer: tokens of both kinds of blocks.
        fraction: share of the text that is held out.
        n: bytes of the n-grams that count as repeated.
    """
    from gka.data import byte_tokenizer, find_documents, pack, token_blocks

    packed = pack(find_documents([]), byte_tokenizer())
    training, held = token_blocks(packed, length, fraction)
    rows = np.stack([held[i]["input_ids"].numpy() for i in range(len(held))])
    filler = np.concatenate([packed.tokens[a:b] for a, b in held.part.ranges])
    repeats = Repeats.of(rows, n, (packed.tokens[a:b] for a, b in training.part.ranges))
    count = max(1, len(filler) // longer)
    return Text(rows, repeats, np.resize(filler, (count, longer)), filler.tolist())


@dataclass(frozen=True)
class Measures:
    """The measurements.

    Attributes:
        text: held-out text.
        length: the training's tokens of a sequence.
        batch: sequences of that length in a forward pass.
        dtype: of the arithmetic; caches of attention are counted in it.
        lengths: tokens of the needle texts.
        keys: numbers of keys in one.
        needles: texts for each.
    """

    text: Text
    length: int
    batch: int
    dtype: str
    lengths: tuple[int, ...]
    keys: tuple[int, ...]
    needles: int

    def of(self, model: Any) -> dict[str, Any]:
        """All figures of a model, JSON-ready."""
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "slices": self.slices(model),
            "positions": self.positions(model),
            "needles": self.copied(model),
            "bytes": {str(tokens): memory(model, tokens, self.dtype) for tokens in PLACES},
            "reading": self.speed(model),
        }

    def autocast(self) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def slices(self, model: Any) -> dict[str, dict[str, Any]]:
        """Tokens, loss and accuracy of `Repeats.slices`; far is a quarter of the length."""
        losses, right = token_losses(model, self.text.rows, self.batch, self.autocast)
        found = by_slice(losses, right, self.text.repeats.slices(self.length // 4))
        return {
            name: {k: finite(x, 6) if isinstance(x, float) else x for k, x in values.items()}
            for name, values in found.items()
        }

    def positions(self, model: Any) -> list[dict[str, Any]]:
        """Mean loss on long blocks by place: within the training's length, to twice it, to four times, ..."""
        width = self.text.long.shape[1]
        rows = self.text.long[: max(1, 4 * self.batch * self.length // width)]
        batch = max(1, self.batch * self.length // width)
        losses, _ = token_losses(model, rows, batch, self.autocast)
        edges = [0, *(self.length << i for i in range(20) if self.length << i < width), width]
        return [
            {"from": a, "to": b, "loss": finite(float(losses[:, a : b - 1].mean()), 6)}
            for a, b in pairwise(edges)
        ]

    def copied(self, model: Any) -> list[dict[str, Any]]:
        """Shares of characters and of whole values that are copied, by length and number of keys."""
        found = []
        for length in self.lengths:
            batch = max(1, self.batch * self.length // length)
            for keys in self.keys:
                test = NeedleTest.drawn(
                    self.text.filler, length, self.needles, lambda t: list(t.encode()), keys
                )
                part, whole = test.run(model, batch, self.autocast)
                found.append({"length": length, "keys": keys, "copied": part, "whole": whole})
        return found

    @torch.no_grad()
    def speed(self, model: Any) -> float:
        """Tokens per second of reading a batch of the training's size: the median of five, after one."""
        device = next(model.parameters()).device
        ids = torch.from_numpy(np.resize(self.text.rows, (self.batch, self.length))).to(device)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            with self.autocast():
                model(ids, logits_to_keep=1, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return round(ids.numel() / statistics.median(times[1:]), 1)


def memory(model: Any, tokens: int, dtype: str) -> dict[str, int]:
    """Bytes that a row keeps after `tokens` tokens: keys and values, and recurrent states.

    Recurrent states are float32; the last inputs of convolutions count among them in `dtype`.
    """
    from gka.models.cache import state_shapes

    found = {"attention": 0, "recurrent": 0}
    for name, shape in state_shapes(model, 1, tokens).items():
        attends = name.endswith((".keys", ".values"))
        size = 4 if dtype == "float32" or ".recurrent." in name else 2
        found["attention" if attends else "recurrent"] += size * prod(shape)
    return found


def mean_copied(found: Sequence[dict[str, Any]], keys: int, least: int, most: int) -> float:
    """Mean share of copied characters over the lengths from `least` to `most`, with `keys` keys."""
    return statistics.fmean(
        x["copied"] for x in found if x["keys"] == keys and least <= x["length"] <= most
    )
