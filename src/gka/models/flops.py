"""Arithmetic of a training step, the one definition that benchmarks, runs and the planner share.

Model FLOPs of a training step, for N parameters without the embedding (a table that is looked up; a tied
matrix counts as the head that it also is):

    6 N a token: 2 N forward, 4 N backward, whatever is recomputed;
    the mixer's own products on top, for every token, head and layer, forward + backward, K = V = D, C = 64:
        attention       6 T D             causal: half of 2 (QK^T and PV) x 2 T D forward, twice that backward
        swa             12 D (W - W^2 / 2T)            the same, of W tokens back
        gla             3 (4 C D + 4 D^2)              scores and readout, the state's update and its reading
        delta rules     3 (10 C D + 6 D^2)             the same, and the triangular systems' application
        gka             2 r (2 D^2 + 4 C D) + 3 (8 D^2 + 6 C D)       r steps, as many again in the adjoint
        gka, sketched   2 r (2 d^2 + 4 C d) + 3 (4 d^2 + 4 d D + 4 C d + 2 C D) + 12 d D, the last for S^T q
                        and S^T k; with alpha gla's as well, for U^T q

The steps of the adaptive solver and of conjugate gradients depend on the data; without their number only 6 N
is counted. Model FLOP utilisation (MFU) is such FLOPs over the time they took and the peak of the cards.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from gka.models.causal_lm import GKAForCausalLM, ParameterCount, count_parameters
from gka.models.configuration import GKAConfig
from gka.models.fields import SOFTMAX_MIXERS, attention_heads, mixer_values

CHUNK = 64
# TFLOP/s of dense bfloat16 products by their makers' data sheets, by a part of the card's name
DATA_SHEETS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}


@dataclass(frozen=True)
class TokenFlops:
    """Model FLOPs of one token's training, forward and backward.

    Attributes:
        matrices: 6 N.
        whole: with the mixers' own products; None if a solver's number of steps depends on the data.
    """

    matrices: float
    whole: float | None

    @property
    def known(self) -> float:
        """`whole`, or `matrices` where it is None."""
        return self.matrices if self.whole is None else self.whole


def step_flops(dim: int) -> int:
    """Operations of one solver step per token and head: 2 K^2 for H_[c] x and 4 C K for the chunk's keys."""
    return 2 * dim**2 + 4 * CHUNK * dim


def mixer_flops(
    mixer: str,
    dim: int,
    length: int,
    num_iter: int | None = None,
    window: int | None = None,
    sketch: int | None = None,
    alpha: bool = True,
) -> float | None:
    """Of one token, head and layer, forward and backward; None where it is not known.

    Args:
        mixer: a key of `gka.layers.MIXERS`.
        dim: K = V of a head.
        length: tokens of a sequence T.
        num_iter: solver steps r of "gka"; None if they depend on the data.
        window: tokens W that "swa" attends to.
        sketch: d of a "gka" that solves in d dimensions; alpha: whether it has the mix gate.
    """
    if mixer == "attention" or (mixer == "swa" and window is not None and window >= length):
        return 6.0 * length * dim
    if mixer == "swa" and window is not None:
        return 12.0 * dim * (window - window**2 / (2 * length))
    if mixer == "gla":
        return 3.0 * (4 * CHUNK * dim + 4 * dim**2)
    if mixer in ("deltanet", "gated_deltanet"):
        return 3.0 * (10 * CHUNK * dim + 6 * dim**2)
    if mixer == "gka" and num_iter is not None and sketch is not None:
        memory = 4 * sketch**2 + 4 * sketch * dim + 4 * CHUNK * sketch + 2 * CHUNK * dim
        whole = 12.0 * (CHUNK * dim + dim**2) if alpha else 0.0
        return 2.0 * num_iter * step_flops(sketch) + 3.0 * memory + 12.0 * sketch * dim + whole
    if mixer == "gka" and num_iter is not None:
        return 2.0 * num_iter * step_flops(dim) + 3.0 * (8 * dim**2 + 6 * CHUNK * dim)
    return None


def mixer_heads(config: GKAConfig, mixer: str) -> tuple[int, int]:
    """Heads of a mixer's output and their size K."""
    if mixer in SOFTMAX_MIXERS:
        heads, _, dim = attention_heads(config)
        return heads, dim
    values = mixer_values(config, mixer)
    counts = (values["num_heads"], values.get("num_k_heads"), values.get("num_v_heads"))
    return max(count or 0 for count in counts), values["head_dim"]


def token_flops(config: GKAConfig, length: int, parameters: int) -> TokenFlops:
    """Model FLOPs of one token of a sequence of `length` tokens.

    Args:
        config: the model's.
        length: tokens of a sequence, documents packed into it not told apart.
        parameters: N, as `matrix_parameters` counts them.
    """
    matrices, own = 6.0 * parameters, 0.0
    for mixer, layers in Counter(config.pattern).items():
        heads, dim = mixer_heads(config, mixer)
        values = mixer_values(config, mixer)
        steps = values["num_iter"] if values["solver"] == "chebyshev" else None
        found = mixer_flops(
            mixer, dim, length, steps, config.sliding_window,
            values["sketch_dim"], values["use_alpha_connection"],
        )  # fmt: skip
        if found is None:
            return TokenFlops(matrices, None)
        own += found * heads * layers
    return TokenFlops(matrices, matrices + own)


def parameter_table(config: GKAConfig) -> list[ParameterCount]:
    """`count_parameters` of a configuration; no memory is taken for the parameters."""
    with torch.device("meta"):
        return count_parameters(GKAForCausalLM(config))


def matrix_parameters(model: Any) -> int:
    """N: all parameters without the embedding, or all of them if the head is the embedding.

    Of the experts of a layer as many count as a token passes.
    """
    every = sum(p.numel() for p in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    return every - _idle(model) - (0 if tied else table.weight.numel())


def _idle(model: Any) -> int:
    """Parameters of the experts that a token does not pass."""
    moe = model.config.moe
    if moe is None:
        return 0
    body = getattr(model, "model", model)
    experts = [body.layers[i].mlp.experts for i in moe["layers"]]
    there = sum(p.numel() for part in experts for p in part.parameters())
    return there - there * moe["num_experts_per_tok"] // moe["num_experts"]


def peak_tflops(card: str) -> float | None:
    """Dense bfloat16 TFLOP/s by the data sheet; None of a card that is not listed."""
    return next((peak for name, peak in DATA_SHEETS.items() if name in card), None)
