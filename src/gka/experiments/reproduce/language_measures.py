"""What `language` measures of a trained model: losses on held-out text, tasks, memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from gka.data import Holdout
from gka.errors import InputError
from gka.evaluation.context.haystack import Haystack, Pieces
from gka.evaluation.context.reader import Reader
from gka.evaluation.context.tasks import draw_sample
from gka.evaluation.memory_utility import memory_utility
from gka.evaluation.repeats import Repeats, by_slice, gaps, token_losses
from gka.experiments.corpora.build import MEMORY, PARTS
from gka.experiments.reproduce.language_training import (
    Training,
    arithmetic,
    holdouts,
    the_corpus,
)
from gka.models import GKAForCausalLM
from gka.models.cache import state_shapes

TASKS = ("needle", "needle-keys", "needle-only", "facts-1")
WITH_DEPTH = TASKS[:3]
SEED = 1_000_003  # of test prompts; those of the corpus have others


@dataclass(frozen=True)
class Measures:
    """How much is measured.

    Attributes:
        rows: held-out sequences of the training's length, of each part at most.
        ngram: tokens of the n-grams by which a token counts as repeated.
        texts: long held-out texts.
        times: training lengths at whose end the loss by position ends.
        past: tokens before the targets, more than any reset leaves.
        targets: tokens behind them, on which the memory's utility is measured.
        resets: numbers of tokens that are left after a reset.
        prompts: lengths of the tasks' prompts.
        depths: places of the line that is asked for.
        samples: prompts of a length and depth.
    """

    rows: int
    ngram: int
    texts: int
    times: int
    past: int
    targets: int
    resets: tuple[int, ...]
    prompts: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int


@dataclass(frozen=True)
class Prompt:
    """A question after a text, and the ids of its answer."""

    task: str
    length: int
    depth: float
    ids: list[int]
    answer: list[int]


def measure(
    model: GKAForCausalLM, folder: Path, training: Training, measures: Measures, device: str
) -> dict[str, Any]:
    """All figures of a model, JSON-ready: see the functions below."""
    with arithmetic(device), torch.inference_mode():
        reader = Reader(model, chunk=2048)
        texts = long_texts(folder, training, measures)
        return {
            "loss": slice_losses(model, folder, training, measures, device),
            "positions": position_losses(reader, texts, training.length * measures.times),
            "utility": utilities(reader, texts, folder, training, measures),
            "tasks": answers(reader, prompts(folder, measures)),
            "state_bytes": {
                str(tokens): state_bytes(model, tokens)
                for tokens in (training.length, training.length * measures.times)
            },
        }


def slice_losses(
    model: GKAForCausalLM, folder: Path, training: Training, measures: Measures, device: str
) -> dict[str, Any]:
    """Loss and accuracy of each part by slices of `Repeats`; far: a quarter of a sequence back or more."""
    found = {}
    for name in PARTS:
        rows, repeats = repeated(folder, name, training, measures)
        autocast = partial(arithmetic, device)
        losses, right = token_losses(model, rows, training.batch, autocast)
        found[name] = by_slice(losses, right, repeats.slices(far=training.length // 4))
    return found


@lru_cache(maxsize=len(PARTS))
def repeated(
    folder: Path, name: str, training: Training, measures: Measures
) -> tuple[np.ndarray, Repeats]:
    """Held-out sequences of a part [B, length], and what they repeat."""
    part = holdouts(the_corpus(folder), training.held_out)[name]
    rows = _windows(part, training.length, measures.rows)
    known = [part.corpus.shard_tokens(i) for i in part.shards]
    trained = [
        known[i][a : a + n]
        for i in part.shards
        for a, n in zip(part.training(i).starts, part.training(i).lengths, strict=True)
    ]
    return rows, Repeats.of(rows, measures.ngram, trained)


def _windows(part: Holdout, length: int, most: int) -> np.ndarray:
    """Evenly chosen sequences of whole windows of held-out documents."""
    found = [ids[a : a + length] for ids in _documents(part, length)
             for a in range(0, len(ids) - length + 1, length)]  # fmt: skip
    if not found:
        raise InputError(f"no held-out document has {length} tokens; build a larger corpus")
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return np.stack([found[i] for i in places])


def _documents(part: Holdout, least: int) -> list[np.ndarray]:
    """Held-out documents of so many tokens or more."""
    return [
        part.corpus.shard_tokens(number)[start : start + length]
        for number in part.shards
        for start, length in zip(*vars(part.evaluation(number)).values(), strict=True)
        if length >= least
    ]


@lru_cache(maxsize=1)
def long_texts(folder: Path, training: Training, measures: Measures) -> list[list[int]]:
    """Beginnings of held-out documents that are long enough for every measure.

    Raises:
        InputError: there is none.
    """
    length = max(training.length * measures.times, measures.past + measures.targets)
    part = holdouts(the_corpus(folder), training.held_out)[MEMORY]
    found = [ids[:length].tolist() for ids in _documents(part, length)]
    if not found:
        raise InputError(f"no held-out document has {length} tokens; build a larger corpus")
    return Random(0).sample(found, min(measures.texts, len(found)))


def position_losses(
    reader: Reader, texts: Sequence[list[int]], length: int
) -> list[dict[str, Any]]:
    """Mean loss of long texts between positions that double, up to `length`."""
    rows = [(ids[:1], ids[1:length]) for ids in texts]
    losses = torch.stack([losses for losses, _ in reader.losses(rows)])
    edges = [1, *(length >> i for i in reversed(range(7)))]
    return [
        {"start": a, "stop": b, "loss": round(float(losses[:, a - 1 : b - 1].mean()), 5)}
        for a, b in pairwise(edges)
    ]


def utilities(
    reader: Reader, texts: Sequence[list[int]], folder: Path, training: Training, measures: Measures
) -> dict[str, Any]:
    """Mean utility of the memory by reset, on all target tokens and on those that repeat an n-gram."""
    start, stop = measures.past, measures.past + measures.targets
    found = memory_utility(reader, texts, start, stop, measures.resets, span=measures.targets)
    gaps = _gaps(folder, training, measures)[:, start:stop]
    again = torch.from_numpy(gaps > 0)
    far = torch.from_numpy(gaps > measures.targets)
    rows = []
    for n, utility in zip(found.resets, found.utility, strict=True):
        one = {"reset": n, "all": float(utility.mean())}
        for name, mask in (("repeated", again), ("far", far)):
            one[name] = float(utility[mask].mean()) if bool(mask.any()) else None
        rows.append(one)
    return {
        "rows": rows, "carried": float(found.carried.mean()), "texts": len(texts),
        "tokens": {"all": again.numel(), "repeated": int(again.sum()), "far": int(far.sum())},
    }  # fmt: skip


@lru_cache(maxsize=1)
def _gaps(folder: Path, training: Training, measures: Measures) -> np.ndarray:
    return gaps(np.asarray(long_texts(folder, training, measures)), measures.ngram)


@lru_cache(maxsize=1)
def prompts(folder: Path, measures: Measures) -> list[Prompt]:
    """The prompts of all tasks; the same for every model."""
    corpus = the_corpus(folder)
    haystack = Haystack(corpus.haystack, Pieces(corpus.tokenizer))
    found = []
    for task in TASKS:
        depths = measures.depths if task in WITH_DEPTH else (0.0,)
        samples = measures.samples * len(measures.depths) // len(depths)
        for length in measures.prompts:
            for depth in depths:
                for i in range(samples):
                    sample = draw_sample(task, length, depth, SEED, i, haystack)
                    (answer,) = haystack.pieces.encode([f" {sample.answers[0]}"])
                    found.append(Prompt(task, length, depth, sample.ids, answer))
    return found


def answers(reader: Reader, asked: Sequence[Prompt]) -> list[dict[str, Any]]:
    """By task, length and depth: share of answers that greedy decoding gives whole, and of their tokens."""
    groups: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in asked:
        groups.setdefault((prompt.task, prompt.length), []).append(prompt)
    scores: dict[tuple[str, int, float], list[tuple[float, float]]] = {}
    for (task, length), group in groups.items():
        size = max(1, (1 << 18) // length)
        for at in range(0, len(group), size):
            some = group[at : at + size]
            found = reader.losses([(p.ids, p.answer) for p in some])
            for prompt, (_, right) in zip(some, found, strict=True):
                score = float(right.all()), float(right.float().mean())
                scores.setdefault((task, length, prompt.depth), []).append(score)
    return [
        {"task": task, "length": length, "depth": depth, "samples": len(pairs),
         "accuracy": sum(x for x, _ in pairs) / len(pairs),
         "tokens_right": sum(y for _, y in pairs) / len(pairs)}
        for (task, length, depth), pairs in scores.items()
    ]  # fmt: skip


def state_bytes(model: GKAForCausalLM, tokens: int) -> int:
    """Bytes of what a model keeps of one row after so many tokens: float32 states, 16-bit keys and values."""
    found = 0
    for name, shape in state_shapes(model, 1, tokens).items():
        found += (4 if ".recurrent." in name else 2) * int(np.prod(shape))
    return found
