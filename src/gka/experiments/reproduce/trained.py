"""Keys, queries and states of a trained model's layers on text that it was not trained on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError


def held_out_ids(folder: Path, most: int) -> tuple[Any, Tensor]:
    """The model of a finished run of `gka train`, and ids [T <= most] of its held-out text.

    Raises:
        InputError: there is no such run.
    """
    from gka.checkpoints.open import load_gka, load_tokenizer_of
    from gka.data import find_documents, pack, split
    from gka.storage import read_json
    from gka.training import folder as files
    from gka.training.config import RunConfig

    metrics = folder / files.METRICS
    if not metrics.is_file():
        raise InputError(f"{folder} holds no finished run of `gka train`")
    data = RunConfig.from_tables(read_json(metrics)["config"]).data
    model: Any = load_gka(folder / files.MODEL, dtype="float32", device="cpu").eval()
    packed = pack(find_documents(data.text, data.glob), load_tokenizer_of(folder / files.MODEL))
    ranges = split(packed, data.eval_fraction)[1].ranges
    ids = torch.cat([torch.from_numpy(packed.tokens[a:b].astype("int64")) for a, b in ranges])
    return model, ids[:most]


@torch.no_grad()
def trained_systems(folder: Path, length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(H_t [S,K,K], q_t [S,K]), float64, of all GKA layers and heads at `tokens` positions of one text.

    Args:
        folder: of a finished run of `gka train`.
        length: tokens that the model reads, fewer if its held-out text is shorter.
        tokens: number of evenly spaced positions, the last token among them.

    Raises:
        InputError: there is no such run, or its model has no GKA layer.
    """
    from gka.layers import GatedKalmaNet
    from gka.models import GKACache
    from gka.serving.tokens import prefill

    model, ids = held_out_ids(folder, length)
    found: list[tuple[Tensor, Tensor]] = []

    def look(mixer: GatedKalmaNet, q: Tensor, k: Tensor, seen: Any) -> None:
        k = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
        k = k if seen.beta is None else k * seen.beta.double().unsqueeze(-1)
        fades = seen.g if mixer.use_forgetting_gate_kk else None
        g = torch.zeros_like(k[..., 0]) if fades is None else fades.double()
        found.append(sampled(q[0].transpose(0, 1).double(), k[0].transpose(0, 1), g[0].mT, tokens))

    mixers = [layer.mixer for layer in model.model.layers]
    watched = {i: look for i, mixer in enumerate(mixers) if isinstance(mixer, GatedKalmaNet)}
    if not watched:
        raise InputError(f"the model of {folder} has no Gated KalmaNet layer")
    cache = GKACache(model.config)
    with cache.observing(watched):
        prefill(model, ids[None], cache, chunk=len(ids))
    return torch.cat([h for h, _ in found]), torch.cat([q for _, q in found])


def sampled(q: Tensor, k: Tensor, g: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(H_t [S,K,K], q_t [S,K]) of N sequences at `tokens` even positions each, S = N tokens.

    Args:
        q, k: [N,T,K]. g: log decay of H [N,T].
    """
    length = k.shape[1]
    ends = sorted({-(-length * (i + 1) // tokens) for i in range(tokens)})
    h, begin, states = k.new_zeros(len(k), k.shape[-1], k.shape[-1]), 0, []
    for end in ends:
        total = g[:, begin:end].cumsum(1)
        to_end = (total[:, -1:] - total).exp().unsqueeze(-1)
        part = k[:, begin:end]
        h = total[:, -1].exp()[:, None, None] * h + (to_end * part).mT @ part
        states.append(h)
        begin = end
    last = torch.tensor(ends, device=q.device) - 1
    return torch.stack(states, 1).flatten(0, 1), q[:, last].flatten(0, 1)
