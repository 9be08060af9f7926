"""The models of `mqar`: two layers of one mixer, each with short convolutions, and what they remember in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from gka.evaluation.mqar import MQARTask
from gka.evaluation.plots import MIXER_STYLES

LAYERS = 2
FLOAT32 = 4  # bytes of an entry of a state
_VALUES_TWICE = ("gated_deltanet", "deltanet", "gla")


@dataclass(frozen=True)
class Mixer:
    """One mixer of the comparison.

    Attributes:
        style: label, colour and marker.
        name: a key of `gka.layers.MIXERS`, or of `gka.experiments.fla_mixers.LAYERS`.
        entries: entries of a layer's state, for one head of K keys and V values after T tokens.
        options: constructor options that differ from the defaults.
    """

    style: tuple[str, str, str]
    name: str
    entries: Callable[[int, int, int], int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def compiles(self) -> bool:
        """Whether kernels of this library are to be compiled before a GPU's first step."""
        return self.name in ("gka", "gla")

    @property
    def foreign(self) -> bool:
        """Whether it is a layer of flash-linear-attention."""
        return ":" in self.name


def _both(k: int, v: int, length: int) -> int:
    return k * k + k * v


def _values(k: int, v: int, length: int) -> int:
    return k * v


# The paper's figure has neither decay nor alpha; beta is a gate of the released layer, and is left out too.
_UNGATED = {"use_forgetting_gate": False, "use_beta_gate": False, "use_alpha_connection": False}
MIXERS = {
    "gka": Mixer(MIXER_STYLES["gka"], "gka", _both),
    "gka_ungated": Mixer(("GKA without gates, α", "#56B4E9", "p"), "gka", _both, _UNGATED),
    "attention": Mixer(
        MIXER_STYLES["attention"], "attention", lambda k, v, length: length * (k + v),
        {"use_short_conv": True},
    ),
    "gated_deltanet": Mixer(
        MIXER_STYLES["gated_deltanet"], "gated_deltanet", _values, {"backend": "torch"}
    ),
    "deltanet": Mixer(MIXER_STYLES["deltanet"], "deltanet", _values, {"backend": "torch"}),
    "gla": Mixer(MIXER_STYLES["gla"], "gla", _values),
    "kda": Mixer(("KDA", "#CC79A7", "*"), "fla:kda", _values),
    "mesa_net": Mixer(("MesaNet", "#8B4513", "h"), "fla:mesa_net", _both),
    "mamba2": Mixer(("Mamba2", "#777777", "X"), "fla:mamba2", lambda k, v, length: 2 * k * v),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Two layers of one head of K = width keys and V = expand K values.

    Attributes:
        mixer: a key of `MIXERS`.
        width: of the residual stream, and K.
        expand: V over K, above 1 for the comparison at equal state bytes.
    """

    mixer: str
    width: int
    expand: int = 1

    def __str__(self) -> str:
        wide = "" if self.expand == 1 else f" with V = {self.expand} K"
        return f"{self.mixer}{wide}, width {self.width}"

    def state_bytes(self, length: int) -> int:
        """Bytes of the memory of one sequence of `length` tokens in float32, without convolutions' inputs."""
        entries = MIXERS[self.mixer].entries(self.width, self.expand * self.width, length)
        return LAYERS * FLOAT32 * entries


def available(device: str) -> tuple[str, ...]:
    """Keys of the mixers that are compared there: layers of flash-linear-attention on a GPU that has it."""
    theirs = torch.device(device).type == "cuda" and find_spec("fla") is not None
    return tuple(name for name, mixer in MIXERS.items() if theirs or not mixer.foreign)


def can_expand(mixer: str) -> bool:
    """Whether the mixer's state can be made as large as GKA's by values twice as wide as keys."""
    return mixer in _VALUES_TWICE


def build(model: Model, task: MQARTask, device: str) -> Any:
    """The model, a `GKAForCausalLM`, with weights from torch's global generator of the CPU.

    Embeddings are tied as in Zoology. They start with a standard deviation of 1, so that tokens dominate the
    residual stream and not random mixers' outputs; matrices with 1/sqrt(width), in foreign layers too: with
    the 0.02 of large models such narrow ones take thousands of steps before they learn. The last norm starts
    at 1/sqrt(width), and so logits with a deviation of about 1: with norms of 1 and an untied head, attention
    had answered 0.1 of the queries after 600 steps, where it now solves the task in 300 (16 pairs in 64
    tokens, width 32).

    Raises:
        NotAvailable: a layer of flash-linear-attention cannot be built.
    """
    from gka.models import GKAConfig, GKAForCausalLM

    mixer, width = MIXERS[model.mixer], model.width
    name = "gla" if mixer.foreign else mixer.name
    config = GKAConfig(
        vocab_size=task.vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        mixers=[name] * LAYERS,
        num_heads=1,
        head_dim=width,
        expand_v=float(model.expand),
        attention_num_heads=1,
        attention_head_dim=width,
        max_position_embeddings=task.input_seq_len,
        initializer_range=width**-0.5,
        tie_word_embeddings=True,
        use_cache=False,
        backend="triton" if torch.device(device).type == "cuda" else "torch",
        mixer_overrides=None if mixer.foreign else {name: mixer.options},
    )
    made: Any = GKAForCausalLM(config)
    if mixer.foreign:
        _replace_mixers(made, mixer.name, width)
    nn.init.normal_(made.model.embed_tokens.weight)
    nn.init.constant_(made.model.norm.weight, width**-0.5)
    return made.to(device)


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    heads: int
    dim: int


def _replace_mixers(model: Any, name: str, width: int) -> None:
    """Put layers of theirs into the decoder, their matrices drawn as ours."""
    from gka.experiments import fla_mixers

    fla_mixers.replace_mixers(model, name, _Sizes(width, 1, width))
    for block in model.model.layers:
        for module in block.mixer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5)
