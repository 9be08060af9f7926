"""States and next tokens of a trained model's GKA layers, after a text that it has not been trained on."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.decode_inputs import Layer, Shape
from torch import Tensor

from gka.errors import InputError
from gka.layers import gated_kalmanet

READ = 16  # sequences at a time
HELD_OUT = 0.01  # of the standard library, as in training unless told otherwise
TOKEN = ("q", "k", "v", "g", "gk", "alpha")


class Trained:
    """A model that has read `context` tokens from as many places of a text as there are sequences.

    Args:
        options: `model`, `text`, `context`, `device`, `batches`.

    Raises:
        InputError: the model cannot be loaded or has no such states, or the text is too short.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from gka.checkpoints.open import load_gka, load_tokenizer_of
        from gka.models.solver import gka_layers
        from gka.serving.reading import check_model

        self.name = name_of(options.model)
        model: Any = load_gka(options.model, dtype="bfloat16", device=options.device)
        check_model(model)
        mixers = gka_layers(model)
        if not mixers or mixers[0].num_iter == 0:
            raise InputError(f"model {options.model} has no GKA layer that solves (num_iter > 0)")
        ids = text_ids(load_tokenizer_of(options.model), options.text)
        rows, apart = places(ids, max(options.batches), options.context + 1)
        self.read = next_tokens(model, rows.to(options.device), len(mixers))
        self.shape = Shape.of(self.read[0])
        self.about: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": model.config.num_hidden_layers, "gka_layers": len(mixers),
            "text": ", ".join(p.name for p in options.text) or "standard library, held-out part",
            "context": options.context, "tokens_apart": apart,
            "solver": mixers[0].solver, "num_iter": mixers[0].num_iter,
            "ridge_ratio": mixers[0].ridge_ratio,
        }  # fmt: skip

    def layers(self, batch: int) -> list[Layer]:
        """The model's own, for the first sequences."""
        return [layer[:batch] for layer in self.read]


def name_of(folder: Path) -> str:
    """Of a model's folder, or of the run that it lies in."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def text_ids(tokenizer: Any, text: list[Path]) -> Tensor:
    """Ids of the files and folders given, or of the held-out documents of the standard library."""
    from gka.data import find_documents, pack, split

    packed = pack(find_documents([str(path) for path in text]), tokenizer)
    ranges = [(0, len(packed.tokens))] if text else split(packed, HELD_OUT)[1].ranges
    parts = [torch.from_numpy(packed.tokens[low:high].astype("int64")) for low, high in ranges]
    return torch.cat(parts)


def places(ids: Tensor, count: int, length: int) -> tuple[Tensor, int]:
    """`count` sequences of `length` ids [count,length] from evenly spaced places, and their distance.

    Raises:
        InputError: there are fewer places than sequences.
    """
    apart = (len(ids) - length) // max(1, count - 1)
    if len(ids) < length or (apart < 1 and count > 1):
        raise InputError(
            f"the text has {len(ids)} tokens, too few for {count} sequences of {length}: give more text "
            "(--text), a shorter --context or smaller --batches"
        )
    return torch.stack([ids[i * apart : i * apart + length] for i in range(count)]), apart


def next_tokens(model: Any, rows: Tensor, count: int) -> list[Layer]:
    """States and tokens of the `count` GKA layers where each reads the last id of the rows [B,T].

    Raises:
        InputError: a layer does not step on states in place.
    """
    from gka.models import GKACache
    from gka.serving.reading import prefill

    found: list[list[Layer]] = []
    for part in rows.split(READ):
        cache = GKACache(model.config)
        prefill(model, part[:, :-1], cache)
        with watched() as seen:
            prefill(model, part[:, -1:], cache)
        if len(seen) != count:
            raise InputError(
                f"{len(seen)} of {count} GKA layers stepped on states in place; layers with "
                'backend="reference" do not'
            )
        found.append(seen)
    layers = [joined(list(parts)) for parts in zip(*found, strict=True)]
    if len({Shape.of(layer) for layer in layers}) > 1:
        raise InputError("the model's GKA layers differ in their heads or sizes; expected one size")
    return layers


@contextmanager
def watched() -> Iterator[list[Layer]]:
    """What the layers give the op of decoding inside, call by call: its own inputs, the states copied."""
    seen: list[Layer] = []
    op = gated_kalmanet.fused_recurrent_gka_

    def watching(*given: Any, state: tuple[Tensor, Tensor], beta: Tensor | None, **rest: Any):
        *inputs, scale, ridge_ratio, _ = given
        h, u = (x.float().clone() for x in state)
        token = dict(zip(TOKEN, inputs, strict=True)) | {"beta": beta}
        seen.append(Layer((h, u), token, {"scale": scale, "ridge_ratio": ridge_ratio}))
        return op(*given, state=state, beta=beta, **rest)

    with mock.patch.object(gated_kalmanet, "fused_recurrent_gka_", watching):
        yield seen


def joined(parts: list[Layer]) -> Layer:
    """Sequences of several reads of one layer, one after the other."""
    h, u = (torch.cat(states) for states in zip(*(part.state for part in parts), strict=True))
    token: dict[str, Tensor | None] = {}
    for name in parts[0].token:
        given = [x for x in (part.token[name] for part in parts) if x is not None]
        token[name] = torch.cat(given) if given else None
    return Layer((h, u), token, parts[0].settings).tied(parts[0])
