"""Bytes that a GPU sends and receives in a step, by kind of parallelism."""

from collections import Counter
from dataclasses import dataclass

from gka.models.fields import SOFTMAX_MIXERS, attention_heads
from gka.models.flops import mixer_heads
from gka.parallel.planner.job import Job


@dataclass(frozen=True)
class Exchange:
    """Bytes that leave one GPU in an optimizer step, in ring algorithms of n ranks.

    Attributes:
        dp_shard: parameters gathered before each layer's forward and backward pass, gradients reduced.
        dp_replicate: gradients summed over replicas.
        cp: end states of recurrent layers, keys and values of attention, halos of convolutions.
        tp: sums of the mixers' and MLPs' outputs, and of their inputs' gradients.
    """

    dp_shard: float
    dp_replicate: float
    cp: float
    tp: float

    @property
    def total(self) -> float:
        return self.dp_shard + self.dp_replicate + self.cp + self.tp


def exchange(job: Job) -> Exchange:
    """The exchanges of one optimizer step."""
    layout, passes = job.layout, job.accumulation
    own = job.parameters / layout.tp
    ring = (layout.shards - 1) / layout.shards
    gathered = 2 * 2 * own * ring
    reduced = (4 if job.autocast else 2) * own * ring
    copies = (layout.dp_replicate - 1) / layout.dp_replicate
    replicated = 2 * (4 if job.autocast else 2) * own / layout.shards * copies
    again = 3 if job.checkpointing == "full" else 2
    return Exchange(
        dp_shard=passes * (gathered + reduced),
        dp_replicate=replicated,
        cp=passes * context_bytes(job),
        tp=passes * again * _tensor_bytes(job),
    )


def _tensor_bytes(job: Job) -> float:
    """Two sums over tp ranks a layer and pass: of the mixer's and of the MLP's output."""
    tp = job.layout.tp
    each = 2 * (tp - 1) / tp * 2.0 * job.local_tokens * job.config.hidden_size
    return 2 * each * len(job.config.pattern)


def context_bytes(job: Job) -> float:
    """Of all layers, forward and backward, on a micro-batch.

    A rank's end state of a Gated KalmaNet layer is (K^2 + KV + 1) H float32, gathered once forward; its
    gradient comes back by a reduce-scatter. So n - 1 times that leave a rank each way. Convolutions read
    width - 1 queries, keys and values of the rank before; attention reads keys and values of all earlier
    ranks, or those of its window. The bytes are those of the rank that sends most.
    """
    config, others = job.config, job.layout.cp - 1
    if not others:
        return 0.0
    again = 2 if job.checkpointing == "none" else 3  # a recomputed layer exchanges anew
    total = 0.0
    for mixer, count in Counter(config.pattern).items():
        heads, dim = mixer_heads(config, mixer)
        if mixer in SOFTMAX_MIXERS:
            length = others * job.length / job.layout.cp
            reach = min(config.sliding_window - 1.0, length) if mixer == "swa" else length
            each = 2 * 2.0 * job.micro * reach * attention_heads(config)[1] * dim / job.layout.tp
        else:
            states = 2 if mixer == "gka" else 1
            end_state = 4.0 * heads * (states * dim**2 + 1) / job.layout.tp
            halo = 2.0 * (config.conv_size - 1) * 3 * heads * dim / job.layout.tp
            each = job.micro * (others * end_state + halo)
        total += again * count * each
    return total
