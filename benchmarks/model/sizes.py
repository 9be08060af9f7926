"""What `python -m benchmarks.run model` trains: sizes of models, their mixers, and the arithmetic of a step.

The formulas of model FLOPs: `gka.models.flops`, which runs and the planner use too.
"""

from dataclasses import dataclass
from typing import Any

from gka.models import flops
from gka.models.flops import peak_tflops as peak_tflops


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


# "1b" has the width and depth of the paper's 1B (gka/recipes/1b.toml).
SIZES = {
    "tiny": ModelSize(2, 64, 2, 32, 256, 2, 64, "float32"),
    "28m": ModelSize(8, 512, 8, 64, 256, 32, 1024, "autocast"),
    "395m": ModelSize(24, 1024, 8, 128, 32000, 8, 2048),
    "395m-32k": ModelSize(24, 1024, 8, 128, 32000, 1, 32768),
    "1b": ModelSize(28, 1536, 12, 128, 32000, 8, 2048),
    "1b-32k": ModelSize(28, 1536, 12, 128, 32000, 1, 32768),
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


def mixer_flops(mixer: str, size: ModelSize) -> float | None:
    """Of one token, head and layer, forward and backward; None where it is not known."""
    config = MIXERS.get(mixer, {})
    steps = None if "solver" in config else config.get("num_iter")
    return flops.mixer_flops(config.get("mixer", mixer), size.dim, size.length, steps)


def model_flops(mixer: str, size: ModelSize, parameters: int) -> tuple[float, float | None]:
    """Of one training step: 6 N a token, and with the mixer's own products if they are known."""
    matrices = 6.0 * parameters * size.tokens
    own = mixer_flops(mixer, size)
    if own is None:
        return matrices, None
    return matrices, matrices + own * size.heads * size.layers * size.tokens
