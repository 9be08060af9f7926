"""Which attention layers are replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.console import status
from gka.errors import InputError
from gka.models.pattern import SOFTMAX_MIXERS
from gka.models.replacement import check_replacement
from gka.storage import read_json, write_json
from gka.training.folder import is_main_process
from gka.training.priming.config import EVERY_OTHER, RANK, PrimeConfig
from gka.training.priming.measure import HeldOut

if TYPE_CHECKING:
    from rich.console import Console

    from gka.models import GKAForCausalLM

RANKING = "ranking.json"


def attention_layers(model: "GKAForCausalLM") -> list[int]:
    """The softmax layers of a model.

    Raises:
        InputError: it has none.
    """
    found = [i for i, name in enumerate(model.config.pattern) if name in SOFTMAX_MIXERS]
    if not found:
        names = ", ".join(sorted(set(model.config.pattern)))
        raise InputError(f"the teacher has no attention layers to replace: its layers are {names}")
    return found


def check_layers(config: PrimeConfig, model: "GKAForCausalLM") -> None:
    """Raise `InputError` for layers, a mixer or options that cannot be used, before any work is done."""
    prime, softmax = config.prime, attention_layers(model)
    if prime.count > len(softmax):
        raise InputError(
            f"prime.count is {prime.count}, but the teacher has {len(softmax)} attention layers"
        )
    chosen = prime.listed() if prime.layers not in (EVERY_OTHER, RANK) else softmax
    check_replacement(model.config, chosen, prime.mixer, config.mixer)


def chosen_layers(
    config: PrimeConfig, model: "GKAForCausalLM", held: HeldOut, report: Path, console: "Console"
) -> list[int]:
    """The layers to replace, in order; a ranking is kept in `report`, and read from there if it is there."""
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
    model: "GKAForCausalLM", held: HeldOut, config: PrimeConfig, file: Path, console: "Console"
) -> dict[str, Any]:
    """How much the held-out loss rises when one layer at a time sees a sliding window only.

    Written to `file` after every layer; layers that are in it already are not measured again.

    Returns:
        {"window", "blocks", "loss", "rise": {layer: nats a token}}.
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
    """An attention that sees its last `window` positions only, and then what it saw before."""
    before = attention.window_size
    attention.window_size = window if before is None else min(window, before)
    try:
        yield
    finally:
        attention.window_size = before
