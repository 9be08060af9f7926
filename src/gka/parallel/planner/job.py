"""What is planned: a model, its batches, and the ranks that share the work."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gka.errors import InputError
from gka.models import GKAConfig
from gka.models.causal_lm import ParameterCount
from gka.models.fields import SOFTMAX_MIXERS, attention_heads, mixer_values
from gka.models.flops import CHUNK, parameter_table
from gka.parallel.mesh import Layout


@dataclass(frozen=True)
class Job:
    """A training run of a decoder.

    Attributes:
        config: the model's, with its vocabulary.
        length: tokens of a sequence. micro: sequences of a forward pass of each reader.
        blocks: sequences of an optimizer step, of all readers: the global batch.
        steps: optimizer steps.
        layout: who shares the work, one GPU a rank.
        autocast: float32 weights, products in bfloat16; else weights and moments are bfloat16.
        checkpointing: what the backward pass recomputes, as in `gka.models.recomputation`.
        keep_states: whether GKA layers keep the states at chunk starts.
    """

    config: GKAConfig
    length: int
    micro: int
    blocks: int
    steps: int
    layout: Layout = field(default_factory=Layout)
    autocast: bool = True
    checkpointing: str = "none"
    keep_states: bool = False

    @property
    def accumulation(self) -> int:
        """Forward passes of a step."""
        return max(1, self.blocks // (self.micro * self.layout.readers))

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.blocks * self.length

    @property
    def local_tokens(self) -> float:
        """Tokens of a forward pass on a GPU; tp ranks have the same ones."""
        return self.micro * self.length / self.layout.cp

    def changed(self, **values: Any) -> "Job":
        """This job with other values; the table of parameters is built once a model."""
        found = replace(self, **values)
        if "config" not in values:
            vars(found)["table"] = self.table
        return found

    @cached_property
    def table(self) -> list[ParameterCount]:
        """Parameters by part."""
        return parameter_table(self.config)

    @cached_property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.table)

    @cached_property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def matrices(self) -> int:
        """N: parameters that a token is multiplied by."""
        return self.parameters - (0 if self.config.tie_word_embeddings else self.embedding)

    def layer_parameters(self, mixer: str) -> float:
        """Of a layer with that mixer."""
        parts = {part.part: part.parameters / part.modules for part in self.table}
        return parts[f"mixer: {mixer}"] + parts["mlp"]


def check(job: Job) -> None:
    """Raise `InputError` if heads, sequences or batch cannot be shared as `job.layout` says."""
    if job.config.moe is not None:
        raise InputError("the planner has no model of mixtures of experts")
    _check_heads(job)
    cp, readers = job.layout.cp, job.layout.readers
    if job.length % (cp * CHUNK):
        fitting = [n for n in range(1, 65) if job.length % (n * CHUNK) == 0]
        raise InputError(
            f"cp = {cp} does not fit sequences of {job.length} tokens: each rank's part must be a multiple "
            f"of {CHUNK}; what fits: {', '.join(map(str, fitting)) or 'no cp'}"
        )
    if job.blocks % (readers * job.micro):
        each = [n for n in range(1, job.blocks + 1) if job.blocks % (n * job.micro) == 0]
        raise InputError(
            f"{job.blocks} sequences a step cannot be shared evenly by {readers} groups of GPUs with "
            f"{job.micro} at a time; what fits at {job.micro}: dp_replicate x dp_shard = "
            f"{', '.join(map(str, each)) or 'nothing'}; or lower the batch size to "
            f"{math.gcd(job.micro, max(1, job.blocks // readers))}"
        )


def _check_heads(job: Job) -> None:
    tp = job.layout.tp
    counts: dict[str, int] = {}
    for mixer in set(job.config.pattern):
        if mixer in SOFTMAX_MIXERS:
            heads, kv, _ = attention_heads(job.config)
            counts |= {f"{mixer} heads": heads}
            counts |= {f"{mixer} key-value heads": kv} if kv > tp else {}
            continue
        values = mixer_values(job.config, mixer)
        named = {name: values.get(name) for name in ("num_heads", "num_v_heads", "num_kv_heads")}
        counts |= {
            f"{mixer} {name}": n
            for name, n in named.items()
            if n and (n > tp or name == "num_heads")
        }
    counts["intermediate_size"] = int(job.config.intermediate_size or 1)
    wrong = {name: count for name, count in counts.items() if count % tp}
    if wrong:
        common = math.gcd(*counts.values())
        fitting = [n for n in range(1, common + 1) if common % n == 0 and n <= 64]
        named = ", ".join(f"{count} {name}" for name, count in wrong.items())
        raise InputError(
            f"tp = {tp} does not divide {named}; what fits: {', '.join(map(str, fitting))}"
        )
