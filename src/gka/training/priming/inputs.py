"""Inputs of a priming run: tokenizer, blocks, measurements on held-out blocks, layers to replace."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase

from gka.checkpoints.open import model_folder
from gka.console import status
from gka.data import load_tokenizer, token_blocks, vocabulary_size
from gka.data.chat import chat_blocks
from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.fields import SOFTMAX_MIXERS
from gka.models.loss import next_token_targets
from gka.models.replacement import check_replacement
from gka.storage import read_json, write_json
from gka.training.folder import is_main_process
from gka.training.inputs import pack_text
from gka.training.priming.config import EVERY_OTHER, RANK, PrimeConfig
from gka.training.priming.matching import Matching

Collate = Callable[[list[Any]], dict[str, Tensor]]


class HeldOut:
    """Held-out blocks and the measurements on them.

    Args:
        blocks: the data set; its `collate` is used if it has one.
        batch_size: blocks per forward pass.
        dtype: "float32", or "bfloat16" for autocast.
        bytes_per_target: mean bytes of text per predicted token.
    """

    def __init__(
        self, blocks: Dataset, batch_size: int, dtype: str, bytes_per_target: float
    ) -> None:
        self.blocks, self.batch_size, self.dtype = blocks, batch_size, dtype
        self.bytes_per_target = bytes_per_target
        self.collate: Collate = getattr(blocks, "collate", default_collate)

    def batches(self, device: torch.device, most: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches of the first `most` blocks (None: all), on `device`."""
        count = len(self.blocks)  # type: ignore[arg-type]
        count = count if most is None else min(count, most)
        for start in range(0, count, self.batch_size):
            items = [self.blocks[i] for i in range(start, min(count, start + self.batch_size))]
            yield {name: value.to(device) for name, value in self.collate(items).items()}

    def autocast(self, device: torch.device) -> Any:
        """Context of the arithmetic that training uses."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @torch.no_grad()
    def loss(self, model: Any, most: int | None = None) -> float:
        """Mean loss in nats over the predicted tokens of the first `most` blocks (None: all)."""
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
        """`loss` (nats per token), `perplexity` (its exponential) and `bits_per_byte` of text."""
        loss = self.loss(model)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / self.bytes_per_target,
        }

    @torch.no_grad()
    def match(self, matching: Matching, device: torch.device) -> dict[str, float]:
        """e_l (`gka.training.priming.matching`) of each replaced layer, a mean over batches."""
        with self.autocast(device):
            rows = [matching(**batch)["layers"] for batch in self.batches(device)]
        means: Sequence[float] = torch.stack(rows).double().mean(0).tolist()
        return dict(zip(matching.mixers, means, strict=True))


@contextmanager
def in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode for the block, then back into its former mode."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def share_recovered(teacher: float, initial: float, now: float) -> float | None:
    """Recovered share of the loss that the replacement cost: 0 none, 1 all; None if it cost nothing."""
    gap = initial - teacher
    return (initial - now) / gap if gap > 0 else None


def open_tokenizer(config: PrimeConfig, teacher: GKAForCausalLM) -> PreTrainedTokenizerBase:
    """The tokenizer that the run names, else the one in the teacher's folder.

    Raises:
        InputError: there is none, or it has more ids than the teacher has embeddings.
    """
    name = config.data.tokenizer or str(_tokenizer_folder(config.prime.teacher))
    tokenizer = load_tokenizer(name)
    size, known = vocabulary_size(tokenizer), teacher.config.vocab_size
    if size > known:
        raise InputError(
            f"tokenizer {name!r} has {size} ids, the teacher {known}; it must be the teacher's own"
        )
    return tokenizer


def _tokenizer_folder(teacher: str) -> Path:
    folder = model_folder(Path(teacher))
    marks = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / mark).is_file() for mark in marks):
        raise InputError(
            f"teacher {teacher!r} holds no tokenizer; name its tokenizer with --tokenizer (bytes, a folder, "
            "or a name on the Hugging Face hub)"
        )
    return folder


def open_blocks(
    config: PrimeConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[Any, Any]:
    """Training blocks and held-out blocks.

    Raises:
        InputError: text or conversations cannot be used, or do not fill one block of each.
    """
    data = config.data
    if not data.chat:
        packed = pack_text(data, tokenizer, console)
        return token_blocks(packed, data.sequence_length, data.eval_fraction)
    blocks = chat_blocks(data.chat, tokenizer, data.sequence_length, data.eval_fraction)
    count = sum(len(part.conversations) for part in blocks)
    cut = sum(part.cut for part in blocks)
    note = f", {cut} cut to {data.sequence_length} tokens" if cut else ""
    console.print(f"{count} conversations in {len(blocks[0])} blocks{note}", highlight=False)
    return blocks


def held_out(config: PrimeConfig, blocks: Any) -> HeldOut:
    """The held-out blocks with the batch size and dtype of stage 2."""
    size, targets = (
        (blocks.bytes, blocks.targets)
        if config.data.chat
        else (blocks.part.bytes, blocks.part.tokens)
    )
    per_target = size / targets
    return HeldOut(blocks, config.stage2.batch_size, config.stage2.dtype, per_target)


RANKING = "ranking.json"


def attention_layers(model: GKAForCausalLM) -> list[int]:
    """Indices of a model's softmax attention layers.

    Raises:
        InputError: it has none.
    """
    found = [i for i, name in enumerate(model.config.pattern) if name in SOFTMAX_MIXERS]
    if not found:
        names = ", ".join(sorted(set(model.config.pattern)))
        raise InputError(f"the teacher has no attention layers to replace: its layers are {names}")
    return found


def check_layers(config: PrimeConfig, model: GKAForCausalLM) -> None:
    """Raise `InputError` if the run's layers, mixer or mixer options do not fit the teacher."""
    prime, softmax = config.prime, attention_layers(model)
    if prime.count > len(softmax):
        raise InputError(
            f"prime.count is {prime.count}, but the teacher has {len(softmax)} attention layers"
        )
    chosen = prime.listed() if prime.layers not in (EVERY_OTHER, RANK) else softmax
    check_replacement(model.config, chosen, prime.mixer, config.mixer)


def chosen_layers(
    config: PrimeConfig, model: GKAForCausalLM, held: HeldOut, report: Path, console: Console
) -> list[int]:
    """The layers to replace, ascending; a ranking is stored in `report` and read from there on resume."""
    softmax, prime = attention_layers(model), config.prime
    if prime.layers == EVERY_OTHER:
        return softmax[::2]
    if prime.layers != RANK:
        return sorted(prime.listed())
    ranking = rank(model, held, config, report / RANKING, console)
    count = prime.count or -(-len(softmax) // 2)
    best = sorted(ranking["rise"].items(), key=lambda entry: (entry[1], int(entry[0])))[:count]
    return sorted(int(layer) for layer, _ in best)


def rank(
    model: GKAForCausalLM, held: HeldOut, config: PrimeConfig, file: Path, console: Console
) -> dict[str, Any]:
    """Rise of the held-out loss when one layer at a time sees only a sliding window.

    `file` is written after every layer; layers found in it are not measured again.

    Returns:
        {"window", "blocks", "loss", "rise": {layer: nats per token}}.
    """
    window, blocks = config.prime.rank_window, config.prime.rank_blocks
    found = read_json(file) if file.is_file() else {}
    if (found.get("window"), found.get("blocks")) != (window, blocks):
        found = {"window": window, "blocks": blocks, "loss": held.loss(model, blocks), "rise": {}}
    softmax = attention_layers(model)
    with status(console, "ranking layers") as change:
        for layer in softmax:
            if str(layer) not in found["rise"]:
                change(f"ranking layers: {layer} of {softmax[-1]}")
                with windowed(model.model.layers[layer].mixer, window):
                    found["rise"][str(layer)] = held.loss(model, blocks) - found["loss"]
                if is_main_process():
                    write_json(file, found)
    return found


@contextmanager
def windowed(attention: Any, window: int) -> Iterator[None]:
    """Limit an attention to the last `window` positions, for the length of the block."""
    before = attention.window_size
    attention.window_size = window if before is None else min(window, before)
    try:
        yield
    finally:
        attention.window_size = before
