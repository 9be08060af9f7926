"""The model that a run begins with, and what a recipe leaves to its user: text, tokenizer, a model."""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from gka.checkpoints.open import load_gka
from gka.data import vocabulary_size
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from gka.models.fields import GKAFields, fewest_parameters
from gka.parallel import Layout, current, without_memory
from gka.parallel.state import spread_weights
from gka.training.config import YOURS, RunConfig
from gka.training.loop import recompute_layers

Fill = Callable[[Any, torch.device], None]
"""Gives a model on the meta device its memory on a device and its first weights."""

FREE = {
    "backend", "solver", "num_iter", "ridge_ratio", "sliding_window", "rope_theta", "rope_options",
    "use_cache", "initializer_range", "max_position_embeddings", "pad_token_id", "bos_token_id",
    "eos_token_id", "mixer", "mixers", "attention_layers",
}  # fmt: skip
"""Fields that may differ: none changes a weight's shape or meaning. The mixers are compared by layer."""


def check_given(config: RunConfig) -> None:
    """Raise `InputError` if a run needs text, tokenizer or a model of one's own, and one is not given."""
    data, start = config.data, config.model.get("start")
    if start == YOURS and not Path(YOURS).exists():
        raise InputError(
            "model.start: the recipe goes on with a model that it does not bring; give --start FOLDER, as "
            "in --start runs/2.8b-gka"
        )
    if data.without_text != "error":
        return
    missing = [] if data.text else ["text (PATH ...)"]
    missing += ["a tokenizer (--tokenizer NAME)"] if data.tokenizer == "bytes" else []
    if missing:
        raise InputError(
            f"the recipe comes without text and tokenizer; missing: {' and '.join(missing)}. "
            "For example: gka train CORPUS/ --tokenizer FOLDER-OR-NAME --recipe ...; a trial on the standard "
            "library, byte by byte: --set data.without_text=standard-library"
        )


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> GKAForCausalLM:
    """The untrained model of a run; settings, vocabulary size and seed determine its weights.

    Raises:
        InputError: the [model] table does not describe a model, or it is too large for the memory.
    """
    model = _made(config, tokenizer, GKAForCausalLM, 1.0)
    if folder := config.model.get("start"):
        model.load_state_dict(starting_weights(model, str(folder)))
    return model


def first_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> tuple[GKAForCausalLM, Fill | None]:
    """The untrained model of a run; on several ranks without memory, and what fills it once it is placed.

    The weights are those of `build_model` on every layout. A rank has memory for its own part and a module.

    Raises:
        InputError: as `build_model`.
    """
    job = current()
    if job.ranks == 1:
        return build_model(config, tokenizer), None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = here / (layout.shards * layout.tp) if job.device.type == "cpu" else 0.0
    made: list[Any] = []

    def make(settings: GKAConfig) -> GKAForCausalLM:
        model, first = without_memory(lambda: GKAForCausalLM(settings))
        made.append(first)
        return model

    model = _made(config, tokenizer, make, share)
    weights: dict[str, Tensor] = {}
    if folder := config.model.get("start"):
        weights = starting_weights(model, str(folder))

    def fill(split: Any, device: torch.device) -> None:
        made[0].fill(split, device)
        if weights:
            spread_weights(split, weights)

    return model, fill


def _made(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[GKAConfig], GKAForCausalLM],
    share: float,
) -> GKAForCausalLM:
    """`make` of the run's configuration, seeded; `share` of its parameters is to fit the machine's memory."""
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        settings = GKAConfig(
            **{
                "max_position_embeddings": config.data.sequence_length,
                **{key: value for key, value in config.model.items() if key != "start"},
                "vocab_size": vocabulary_size(tokenizer),
                "pad_token_id": pad,
                **special,
            }
        )
        _check_memory(fewest_parameters(settings), share)
        set_seed(config.training.seed)
        model = make(settings)
    except (TypeError, ValueError, MemoryError) as error:
        raise InputError(f"[model]: {error}") from error
    recompute_layers(model, config.training.gradient_checkpointing)
    return model


def _check_memory(parameters: int, share: float) -> None:
    """Raise `InputError` if a share of so many float32 parameters exceeds the machine's memory."""
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = 4 * parameters * share
    if need > there:
        raise InputError(
            f"{parameters:.3g} parameters or more take {need / 2**30:.3g} GiB, and this machine "
            f"has {there / 2**30:.3g} GiB; lower hidden_size, num_hidden_layers or the vocabulary"
        )


def starting_weights(model: GKAForCausalLM, folder: str) -> dict[str, Tensor]:
    """The weights in `folder`, of a run or of a saved model, for `model`.

    Raises:
        InputError: there is no such model, or it has other sizes or mixers; the message names which.
    """
    # as they are stored: the files are mapped, and ranks copy no more than their parts
    found = load_gka(Path(folder), device="cpu")
    ours, theirs = model.config, found.config
    if ours.pattern != theirs.pattern:
        raise InputError(
            f"model.start {folder} has the mixers {', '.join(theirs.pattern)}; expected "
            f"{', '.join(ours.pattern)}"
        )
    for name in (field.name for field in fields(GKAFields)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name not in FREE and mine != other:
            raise InputError(
                f"model.start {folder} has {name} = {other!r}, and this run {mine!r}; set model.{name}, or "
                "give the tokenizer of that model if it is the vocabulary"
            )
    return found.state_dict()
