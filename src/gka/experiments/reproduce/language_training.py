"""Models of equal budgets for `language`: parameters, tokens and their order are the same for every mixer."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import set_seed

from gka.data import Holdout, TrainingSequences, vocabulary_size
from gka.errors import InputError
from gka.experiments.corpora.build import PARTS, Corpus, open_corpus
from gka.layers import DeltaNet, parameter_groups
from gka.models import GKAConfig, GKAForCausalLM
from gka.ops import last_backend, why_not_external
from gka.training import compilation

ATTENTION = "+attention"  # ends the name of a hybrid
EVERY = 4  # in a hybrid, every fourth layer is attention, the last one among them
WARM = 5  # steps that are left out of the measured speed


@dataclass(frozen=True)
class Training:
    """Size of a model and of its training.

    Attributes:
        width, layers, head_dim: of the model; it has width / head_dim heads.
        length, batch: tokens of a sequence, and sequences of a step.
        steps: optimizer steps.
        rate: highest learning rate, the same for every mixer.
        held_out: share of the corpus that is held out.
    """

    width: int
    layers: int
    head_dim: int
    length: int
    batch: int
    steps: int
    rate: float
    held_out: float

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return self.length * self.batch * self.steps


@lru_cache(maxsize=1)
def the_corpus(folder: Path) -> Corpus:
    """An opened corpus, the same object for all cells of a process."""
    return open_corpus(folder)


def holdouts(corpus: Corpus, held_out: float) -> dict[str, Holdout]:
    """Which documents of each part are held out."""
    return {name: Holdout(corpus.parts[name], held_out) for name in PARTS}


def pattern(mixer: str, layers: int) -> list[str]:
    """The mixer of every layer of "gka", or of its hybrid "gka+attention"."""
    base = mixer.removesuffix(ATTENTION)
    last = [i % EVERY == EVERY - 1 or i == layers - 1 for i in range(layers)]
    return ["attention" if at and base != mixer else base for at in last]


def configuration(mixer: str, training: Training, tokenizer: Any) -> GKAConfig:
    """The mixer's model, its MLPs so wide that it has as many parameters as the model of "gka" alone."""
    wanted = parameters(_config("gka", training, tokenizer, None))
    default = _config(mixer, training, tokenizer, None)
    missing = wanted - parameters(default)
    wider = round(missing / (3 * training.width * training.layers) / 8) * 8
    return _config(mixer, training, tokenizer, int(default.intermediate_size or 0) + wider)


def parameters(config: GKAConfig) -> int:
    """Parameters of a configuration's model."""
    with torch.device("meta"):
        return GKAForCausalLM(config).num_parameters()


def _config(mixer: str, training: Training, tokenizer: Any, inner: int | None) -> GKAConfig:
    return GKAConfig(
        vocab_size=vocabulary_size(tokenizer), hidden_size=training.width,
        mixers=pattern(mixer, training.layers), num_heads=training.width // training.head_dim,
        head_dim=training.head_dim, intermediate_size=inner, tie_word_embeddings=True,
        max_position_embeddings=training.length, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


@lru_cache(maxsize=1)
def training_rows(folder: Path, training: Training, seed: int) -> np.ndarray:
    """Ids of all steps in order [steps * batch, length]; of both parts, by their numbers of tokens."""
    corpus = the_corpus(folder)
    parts = list(holdouts(corpus, training.held_out).values())
    sizes = [sum(int(p.training(i).lengths.sum()) for i in p.shards) for p in parts]
    weights = tuple(size / sum(sizes) for size in sizes)
    data = TrainingSequences(
        parts, weights, training.length, apart=False, pad=corpus.tokenizer.pad_token_id, seed=seed
    )
    count = training.steps * training.batch
    rows = np.empty((count, training.length), np.uint16)
    for i in range(count):
        rows[i] = data[i]["input_ids"].numpy()
    return rows


def arithmetic(device: str) -> AbstractContextManager:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device != "cpu" else nullcontext()


def train(
    mixer: str, training: Training, folder: Path, seed: int, device: str
) -> tuple[GKAForCausalLM, dict[str, Any]]:
    """A trained model, and how its training went.

    Returns:
        The model in evaluation mode; curve (rows of step and mean training loss since the row before),
        skipped (steps whose gradients were not finite), tokens_per_second after the first steps, seconds,
        peak_bytes on the GPU, parameters, compiled, kernels.

    Raises:
        InputError: more than one step in 20 was skipped; the message has the first ones.
    """
    rows = torch.from_numpy(training_rows(folder, training, seed).astype(np.int32)).to(device)
    set_seed(seed)
    model: Any = GKAForCausalLM(configuration(mixer, training, the_corpus(folder).tokenizer))
    model = model.to(device).train()
    _choose_kernels(model, device)
    how = compilation.LAYERS if device != "cpu" else compilation.OFF
    if device != "cpu":
        _compile_anew(training)
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with compilation.compiled((model,), how):
        losses, skipped, speed = _steps(model, rows, training, device)
    found = {
        "curve": _curve(losses), "tokens_per_second": speed,
        "seconds": round(time.perf_counter() - began, 2), "compiled": how,
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "parameters": model.num_parameters(), "tokens": training.tokens,
        "skipped": skipped, "kernels": last_backend(),
    }  # fmt: skip
    if len(skipped) > training.steps // 20:
        raise InputError(f"{mixer}, seed {seed}: {_told(skipped, losses)}")
    return model.eval(), found


@lru_cache(maxsize=1)
def _compile_anew(training: Training) -> None:
    """Forget compiled layers of other sizes: a compiler that sees two makes graphs for any."""
    torch.compiler.reset()


def _told(skipped: list[int], losses: Tensor) -> str:
    """Skipped steps in words, the first with their losses."""
    first = ", ".join(f"{step} (loss {losses[step]:.3f})" for step in skipped[:5])
    before = f", loss before {losses[skipped[0] - 1]:.3f}" if skipped[0] else ""
    return (
        f"the gradients of {len(skipped)} of {len(losses)} steps were not finite, at first those of step"
        f" {first}{before}"
    )


def _choose_kernels(model: Any, device: str) -> None:
    """Run the delta rules on flash-linear-attention where it can: flash-qla compiles for minutes.

    The saved configuration stays "auto", so that the model loads elsewhere.
    """
    for layer in model.model.layers:
        mixer = layer.mixer
        if isinstance(mixer, DeltaNet):
            rule = "gated_delta_rule" if mixer.decays else "delta_rule"
            dims = mixer.head_dim, mixer.head_v_dim
            if why_not_external("fla", rule, device, dims=dims) is None:
                mixer.backend = "fla"


def _steps(
    model: nn.Module, rows: Tensor, training: Training, device: str
) -> tuple[Tensor, list[int], float]:
    """All optimizer steps: loss of each [steps], those skipped, and tokens a second after `WARM` steps.

    A step whose gradients are not finite changes nothing; the host does not wait to learn of it.
    """
    optimizer: Any = _optimizer(model, training.rate)
    losses, norms = torch.zeros(2, training.steps, device=device)
    began, warm = 0.0, min(WARM, training.steps - 1)
    for step, ids in enumerate(_batches(rows, training.batch)):
        if step == warm:
            began = _now(device)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * _factor(step, training.steps)
        with arithmetic(device):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norms[step] = norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
    tokens = (training.steps - warm) * training.batch * training.length
    speed = tokens / (_now(device) - began)
    return losses.cpu(), (~norms.isfinite()).nonzero().flatten().tolist(), speed


def _batches(rows: Tensor, batch: int) -> Iterator[Tensor]:
    for ids in rows.split(batch):
        yield ids.long()


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW as one kernel, which takes `found_inf`: 1 for a step to skip."""
    groups = parameter_groups(model, 0.1)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def _factor(step: int, steps: int) -> float:
    """A linear rise over a twentieth of the steps, then a cosine to a tenth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _curve(losses: Tensor) -> list[list[float]]:
    """At most 40 rows of [steps so far, mean of the finite losses since the row before]."""
    size = -(-len(losses) // 40)
    ends = [min(i + size, len(losses)) for i in range(0, len(losses), size)]
    means = [float(part[part.isfinite()].mean()) for part in losses.split(size)]
    rows = zip(ends, means, strict=True)
    return [[end, round(mean, 5)] for end, mean in rows if math.isfinite(mean)]
