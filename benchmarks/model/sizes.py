"""What `python -m benchmarks.run model` trains: sizes of models, their mixers, and the arithmetic of a step.

Model FLOPs of a training step, for N parameters without the embedding (a table that is looked up):

    6 N a token: 2 N forward, 4 N backward, whatever is recomputed;
    the mixer's own products on top, for every token, head and layer, forward + backward, K = V = D, C = 64:
        attention       6 T D             causal: half of 2 (QK^T and PV) x 2 T D forward, twice that backward
        gla             3 (4 C D + 4 D^2)              scores and readout, the state's update and its reading
        delta rules     3 (10 C D + 6 D^2)             the same, and the triangular systems' application
        gka             2 r (2 D^2 + 4 C D) + 3 (8 D^2 + 6 C D)       r steps, as many again in the adjoint

The steps of the adaptive solver and of conjugate gradients depend on the data; without their number only 6 N
is counted.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.registry import CHUNK, step_flops


@dataclass(frozen=True)
class ModelSize:
    """A decoder and what it reads at a step.

    Attributes:
        dim: K = V of a head.
        precision: "autocast" keeps float32 weights and computes in bfloat16, others name the weights' dtype.
    """

    layers: int
    hidden: int
    heads: int
    dim: int
    vocabulary: int
    batch: int
    length: int
    precision: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        heads = f"{self.heads} heads of {self.dim}"
        return f"{self.layers} x {self.hidden}, {heads}, {self.batch} x {self.length} tokens"


# The paper's comparisons begin at 1 B parameters; width and depth of "1b" are chosen here.
SIZES = {
    "tiny": ModelSize(2, 64, 2, 32, 256, 2, 64, "float32"),
    "28m": ModelSize(8, 512, 8, 64, 256, 32, 1024, "autocast"),
    "395m": ModelSize(24, 1024, 8, 128, 32000, 8, 2048),
    "395m-32k": ModelSize(24, 1024, 8, 128, 32000, 1, 32768),
    "1b": ModelSize(16, 2048, 16, 128, 32000, 4, 2048),
    "1b-32k": ModelSize(16, 2048, 16, 128, 32000, 1, 32768),
}
# configuration of each mixer; names with a colon are layers of flash-linear-attention
MIXERS: dict[str, dict[str, Any]] = {
    "gka": {"mixer": "gka", "num_iter": 30},
    "gka-adaptive": {"mixer": "gka", "num_iter": 30, "solver": "adaptive"},
    "gka-8": {"mixer": "gka", "num_iter": 8},
    "gka-cg": {"mixer": "gka", "num_iter": 30, "solver": "cg"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "deltanet": {"mixer": "deltanet"},
    "gla": {"mixer": "gla"},
    "attention": {"mixer": "attention"},
}
DEFAULT_MIXERS = ("gka", "gka-adaptive", "gka-8", "gka-cg", "gated_deltanet", "gla", "attention")
# TFLOP/s of dense bfloat16 products by their makers' data sheets, by a part of the card's name
DATA_SHEETS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}


def mixer_flops(mixer: str, size: ModelSize) -> float | None:
    """Of one token, head and layer, forward and backward; None where it is not known."""
    d, config = size.dim, MIXERS.get(mixer, {})
    if mixer == "attention":
        return 6.0 * size.length * d
    if mixer == "gla":
        return 3.0 * (4 * CHUNK * d + 4 * d**2)
    if mixer in ("deltanet", "gated_deltanet"):
        return 3.0 * (10 * CHUNK * d + 6 * d**2)
    if config.get("mixer") == "gka" and "solver" not in config:
        return 2.0 * config["num_iter"] * step_flops(d) + 3.0 * (8 * d**2 + 6 * CHUNK * d)
    return None


def model_flops(mixer: str, size: ModelSize, parameters: int) -> tuple[float, float | None]:
    """Of one training step: 6 N a token, and with the mixer's own products if they are known."""
    matrices = 6.0 * parameters * size.tokens
    own = mixer_flops(mixer, size)
    if own is None:
        return matrices, None
    return matrices, matrices + own * size.heads * size.layers * size.tokens


def peak_tflops(card: str) -> float | None:
    """By the data sheet; None of a card that is not listed."""
    return next((peak for name, peak in DATA_SHEETS.items() if name in card), None)
